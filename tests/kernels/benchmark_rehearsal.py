"""The GPU's way through `benchmarks/kernels.py`, rehearsed on a CPU: kernels in the interpreter, peers and clock faked.

Run by `test_benchmark.py` in a process with TRITON_INTERPRET=1; prints the table. Times mean nothing here; what is
rehearsed is every line that a GPU session runs before, between and after them.
"""

import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.kernels.interpreter_bf16 import correct_bf16

correct_bf16()
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import kernel_cases  # noqa: E402
import kernel_setting  # noqa: E402

import kernels as benchmark  # noqa: E402
from megalite.kernels import select_kernels  # noqa: E402

TINY = kernel_setting.Sizes(16, 32, 24, 4, 2, 16, 64, (16,), 32)


class Event:
    """Stands in for a CUDA event: every pair is a millisecond apart."""

    def __init__(self, enable_timing):
        self.recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def elapsed_time(self, end):
        assert self.recorded and end.recorded
        return 1.0


def fake_liger():
    def fused_linear(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.t(), targets)

    def refuses(*tensors):
        raise RuntimeError("no such kernel on this device\nand more")

    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_rms_norm = lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)
    module.liger_fused_add_rms_norm = refuses
    module.liger_rope = lambda q, k, cos, sin: kernel_cases.eager_rope(q, k, cos[:, None], sin[:, None])
    module.liger_swiglu = lambda a, b: F.silu(a) * b
    module.liger_cross_entropy = F.cross_entropy
    module.liger_fused_linear_cross_entropy = fused_linear
    return module


def fake_flash():
    module = types.ModuleType("flash_attn")

    def flash_attn_func(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, S, heads, D] -> [B, heads, S, D]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    module.flash_attn_func, module.__version__ = flash_attn_func, "0"
    return module


def main(out: Path) -> None:
    sys.modules |= {"liger_kernel.transformers.functional": fake_liger(), "flash_attn": fake_flash()}
    kernel_setting.Setting.gpu = property(lambda self: True)
    torch.cuda.Event = Event
    for name in ("synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda: 0)
    benchmark.WARM_UP = 0
    clock = benchmark.Clock

    def cuda_clock(device):
        made = clock(device)
        made.cuda, made.flush = True, made.flush[:1024]
        return made

    benchmark.Clock = cuda_clock
    kernels = select_kernels({"default": "triton"}, torch.device("cpu"))
    setting = kernel_setting.Setting(kernels, torch.device("cpu"), torch.bfloat16, TINY, with_compile=False)
    benchmark.run(setting, list(kernel_cases.GROUPS), 2, out / "kernels_rehearsal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
