"""Measure the kernels against their peers, all in one run, interleaved: JSON, a table and a plot.

    python benchmarks/kernels.py [--device cuda|cpu] [--only rms_norm,attention] [--samples 30] [--out DIR]

Every case is timed `--samples` times in turns with its peers, each sample after the caches were flushed by a write of
256 MiB (on a GPU; 64 MiB on a CPU): median, 20th and 80th percentile. Achieved bytes/s and flop/s count what the
operation must move or multiply at least (docs/kernels.md), against the copy bandwidth and matrix-product rate of the
same run. Peers that are not installed are named in the result and left out.
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.kernels import adamw, cross_entropy, flash_attention, rms_norm, rope, select_kernels

EPS = 1e-5


@dataclass
class Case:
    """One operation in one direction: what it must move or multiply, and who does it."""

    name: str
    bytes: float
    flop: float
    implementations: dict[str, Callable[[], Any]]
    prepare: Callable[[], Any] | None = None
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    lengths: tuple[int, ...]
    attention_tokens: int


LLAMA_8B = Sizes(8192, 4096, 14336, 32, 8, 128, 128256, (1024, 2048, 4096, 8192), 16384)
SMALL = Sizes(1024, 256, 688, 8, 4, 32, 8192, (512,), 1024)


@dataclass(frozen=True)
class Setting:
    kernels: Any
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    with_compile: bool

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any] | None:
        return torch.compile(call) if self.with_compile else None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


Contenders = dict[str, Callable[..., Any] | None]


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def both_ways(forward: Callable[..., Any], inputs: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward without a graph, and the backward alone, over one graph that is kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = forward(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(x) for x in outputs]

    def run_forward() -> Any:
        with torch.no_grad():
            return forward(*inputs)

    def run_backward() -> Any:
        return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    return run_forward, run_backward


def elementwise(name: str, contenders: Contenders, inputs: list[Tensor], moved: tuple[float, float],
                absent: list[str]) -> Iterator[Case]:  # fmt: skip
    pairs = {who: both_ways(call, inputs) for who, call in contenders.items() if call}
    for index, direction in enumerate(("forward", "backward")):
        yield Case(
            f"{name} {direction}", moved[index], 0, {who: pair[index] for who, pair in pairs.items()}, None, absent
        )


def norm_cases(at: Setting) -> Iterator[Case]:
    x, residual = (at.randn(at.sizes.tokens, at.sizes.hidden) for _ in range(2))
    weight = at.randn(at.sizes.hidden)
    once = x.numel() * x.element_size()

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm.rms_norm(x, w, EPS)

    contenders: Contenders = {
        "megalite": lambda x, w: at.kernels.rms_norm(x, w, EPS),
        "torch eager": eager,
        "torch F.rms_norm": lambda x, w: F.rms_norm(x, (at.sizes.hidden,), w, EPS),
        "torch.compile": at.compiled(eager),
    }
    liger = optional("liger_kernel.transformers.functional")
    if liger:
        contenders["Liger"] = lambda x, w: liger.liger_rms_norm(x, w, EPS)
    absent = [] if liger else ["Liger"]
    yield from elementwise("rms_norm", contenders, [x, weight], (2 * once, 3 * once), absent)
    both: Contenders = {
        "megalite": lambda x, r, w: at.kernels.add_rms_norm(x, r, w, EPS),
        "torch eager": lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
        "torch.compile": at.compiled(lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS)),
    }
    if liger:
        both["Liger"] = lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, EPS)
    yield from elementwise("add_rms_norm", both, [x, residual, weight], (4 * once, 4 * once), absent)


def rope_cases(at: Setting) -> Iterator[Case]:
    q = at.randn(at.sizes.tokens, 1, at.sizes.heads, at.sizes.width)
    k = at.randn(at.sizes.tokens, 1, at.sizes.kv_heads, at.sizes.width)
    angle = torch.rand(at.sizes.tokens, at.sizes.width // 2, device=at.device)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    contenders: Contenders = {
        "megalite": lambda q, k: at.kernels.rope(q, k, cos, sin),
        "torch eager": lambda q, k: rope.rope(q, k, cos, sin),
        "torch.compile": at.compiled(lambda q, k: rope.rope(q, k, cos, sin)),
    }
    moved = 2.0 * (q.numel() + k.numel()) * q.element_size()
    yield from elementwise("rope", contenders, [q, k], (moved, moved), [])


def swiglu_cases(at: Setting) -> Iterator[Case]:
    gate_up = at.randn(at.sizes.tokens, 2 * at.sizes.ffn)

    def eager(x: Tensor) -> Tensor:
        return F.silu(x[..., : at.sizes.ffn]) * x[..., at.sizes.ffn :]

    contenders = {"megalite": at.kernels.swiglu, "torch eager": eager, "torch.compile": at.compiled(eager)}
    half = gate_up.numel() * gate_up.element_size() / 2
    yield from elementwise("swiglu", contenders, [gate_up], (3 * half, 5 * half), [])


def loss_cases(at: Setting) -> Iterator[Case]:
    logits = at.randn(at.sizes.tokens, at.sizes.vocab)
    source, leaf = logits.clone(), logits.clone().requires_grad_()
    targets = torch.randint(0, at.sizes.vocab, (at.sizes.tokens,), device=at.device)
    grad_N = torch.full((at.sizes.tokens,), 1 / at.sizes.tokens, device=at.device)

    def eager() -> Any:
        return torch.autograd.grad(F.cross_entropy(leaf.float(), targets), leaf)

    contenders = {
        "megalite": lambda: at.kernels.cross_entropy_stats_grad_(logits, targets, grad_N),
        "torch eager": eager,
    }
    fast = at.compiled(lambda z, t: F.cross_entropy(z.float(), t))
    if fast:
        contenders["torch.compile"] = lambda: torch.autograd.grad(fast(leaf, targets), leaf)
    moved = 2.0 * logits.numel() * logits.element_size()
    yield Case("cross_entropy forward + gradient", moved, 0, contenders, prepare=lambda: logits.copy_(source))


def fused_loss_cases(at: Setting) -> Iterator[Case]:
    hidden = at.randn(at.sizes.tokens, at.sizes.hidden).requires_grad_()
    weight = at.randn(at.sizes.vocab, at.sizes.hidden).div_(64).requires_grad_()
    targets = torch.randint(0, at.sizes.vocab, (at.sizes.tokens,), device=at.device)

    def ours() -> Any:
        loss = cross_entropy.fused_linear_cross_entropy(hidden, weight, targets, ops=at.kernels)
        return torch.autograd.grad(loss, (hidden, weight))

    def eager() -> Any:
        return torch.autograd.grad(F.cross_entropy((hidden @ weight.t()).float(), targets), (hidden, weight))

    flop = 6.0 * at.sizes.tokens * at.sizes.hidden * at.sizes.vocab
    yield Case("linear + cross_entropy", 0, flop, {"megalite": ours, "torch eager": eager})


def only_backend(which: SDPBackend) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        with sdpa_kernel(which):
            return flash_attention.attention_sdpa(*tensors)

    return call


def plain_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)


def attention_peers(at: Setting) -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """Everything that computes causal attention here, and what is not installed."""
    peers: dict[str, Callable[..., Any]] = {"megalite": at.kernels.attention}
    if at.device.type == "cpu":
        peers["SDPA"] = plain_sdpa
        peers["explicit fp32"] = flash_attention.attention_reference
        return peers, []
    peers["SDPA flash"] = only_backend(SDPBackend.FLASH_ATTENTION)
    peers["SDPA cuDNN"] = only_backend(SDPBackend.CUDNN_ATTENTION)
    other = optional("flash_attn")
    if other is None:
        return peers, ["flash-attn"]
    peers["flash-attn"] = lambda q, k, v: other.flash_attn_func(*(x.transpose(0, 1) for x in (q, k, v)), causal=True)
    return peers, []


def attention_cases(at: Setting) -> Iterator[Case]:
    peers, missing = attention_peers(at)
    for length in at.sizes.lengths:
        batch = max(1, at.sizes.attention_tokens // length)
        q = at.randn(length, batch, at.sizes.heads, at.sizes.width)
        k, v = (at.randn(length, batch, at.sizes.kv_heads, at.sizes.width) for _ in range(2))
        pairs, absent = {}, list(missing)
        for who, call in peers.items():
            try:
                pairs[who] = both_ways(call, [q, k, v])
                pairs[who][0]()
            except RuntimeError as error:
                pairs.pop(who, None)
                absent.append(f"{who} ({str(error).splitlines()[0]})")
        forward = 2.0 * batch * at.sizes.heads * length * length * at.sizes.width
        for index, (direction, flop) in enumerate((("forward", forward), ("backward", 2.5 * forward))):
            calls = {who: pair[index] for who, pair in pairs.items()}
            yield Case(f"attention causal s{length} d{at.sizes.width} {direction}", 0, flop, calls, None, absent)


def optimizer_cases(at: Setting) -> Iterator[Case]:
    count = at.sizes.tokens * at.sizes.hidden
    w, g, m, v = (torch.rand(count, device=at.device) for _ in range(4))
    options = {"lr": 1e-6, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    param = torch.empty(count, dtype=torch.bfloat16, device=at.device)
    theirs = torch.nn.Parameter(w.clone())
    theirs.grad = g
    fused = torch.optim.AdamW([theirs], lr=1e-6, fused=True)
    yield Case(
        "adamw",
        30.0 * count,
        0,
        {
            "megalite": lambda: at.kernels.adamw_(w, g, m, v, step=10, param_out=param, **options),
            "plain PyTorch": lambda: adamw.adamw_(w, g, m, v, step=10, param_out=param, **options),
            "torch fused AdamW (no bf16 copy)": fused.step,
        },
    )
    yield Case("square_sum", 4.0 * count, 0, {
        "megalite": lambda: at.kernels.square_sum(g),
        "torch vector_norm": lambda: torch.linalg.vector_norm(g, dtype=torch.float64),
    })  # fmt: skip


GROUPS = {
    "rms_norm": norm_cases,
    "rope": rope_cases,
    "swiglu": swiglu_cases,
    "cross_entropy": loss_cases,
    "linear_cross_entropy": fused_loss_cases,
    "attention": attention_cases,
    "adamw": optimizer_cases,
}


class Clock:
    """Times one call at a time with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        size = (256 if self.cuda else 64) << 20
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure(case: Case, clock: Clock, samples: int) -> dict[str, dict[str, float]]:
    """Seconds per implementation: warmed up, then taken in turns."""
    times: dict[str, list[float]] = {who: [] for who in case.implementations}
    for turn in range(samples + 3):
        for who, call in case.implementations.items():
            if case.prepare:
                case.prepare()
            taken = clock(call)
            if turn >= 3:
                times[who].append(taken)
    cut = {who: statistics.quantiles(values, n=5, method="inclusive") for who, values in times.items()}
    return {who: {"median": statistics.median(times[who]), "p20": cut[who][0], "p80": cut[who][3]} for who in times}


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """Copy bandwidth in bytes/s and matrix-product rate in flop/s, the best of ten."""
    cuda = device.type == "cuda"
    a = torch.empty((1 << 30) if cuda else (1 << 26), dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    n = 8192 if cuda else 1024
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    copy = min(clock(lambda: b.copy_(a)) for _ in range(10))
    product = min(clock(lambda: x @ y) for _ in range(10))
    return {"copy_bytes_per_second": 2 * a.numel() / copy, "matmul_flop_per_second": 2 * n**3 / product}


def row(case: Case, times: dict[str, dict[str, float]], limits: dict[str, float]) -> dict[str, Any]:
    ours = times["megalite"]["median"]
    result: dict[str, Any] = {"case": case.name, "seconds": times, "absent": case.absent}
    if case.bytes:
        result["bytes_per_second"] = case.bytes / ours
        result["of_copy_bandwidth"] = case.bytes / ours / limits["copy_bytes_per_second"]
    if case.flop:
        result["flop_per_second"] = case.flop / ours
        result["of_matmul_rate"] = case.flop / ours / limits["matmul_flop_per_second"]
    result["times_faster_than"] = {who: t["median"] / ours for who, t in times.items() if who != "megalite"}
    return result


def line(result: dict[str, Any]) -> str:
    ours = result["seconds"]["megalite"]
    share = result.get("of_copy_bandwidth", result.get("of_matmul_rate", 0.0))
    unit = "copy" if "of_copy_bandwidth" in result else "matmul"
    rate = result.get("bytes_per_second", result.get("flop_per_second", 0.0)) / 1e12
    peers = "  ".join(f"{who} {ratio:.2f}x" for who, ratio in result["times_faster_than"].items())
    return (
        f"{result['case']:<38}{ours['median'] * 1e6:>10.1f} us [{ours['p20'] * 1e6:.1f}, {ours['p80'] * 1e6:.1f}] "
        f"{rate:>8.3f} T/s {share:>6.2f} of {unit:<7} {peers}"
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.4 * sum(len(r["times_faster_than"]) for r in results) + 1))
    labels = [f"{r['case']} vs {who}" for r in results for who in r["times_faster_than"]]
    values = [ratio for r in results for ratio in r["times_faster_than"].values()]
    axes.barh(labels[::-1], values[::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("peer's time / ours (above 1: ours is faster)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine(device: torch.device) -> dict[str, str]:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return result.stdout.strip()

    triton = optional("triton")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "absent",
        "commit": git("rev-parse", "HEAD") + (" (changed)" if git("status", "--porcelain", "../kernels") else ""),
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, of: {', '.join(GROUPS)}")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile as a peer"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(GROUPS)):
        parser.error(f"--only {','.join(unknown)}: no such group; known: {', '.join(GROUPS)}")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with_compile = options.device == "cuda" if options.compile is None else options.compile
    kernels = select_kernels({"attention": "triton"} if device.type == "cuda" else {}, device)
    clock = Clock(device)
    limits = ceilings(device, dtype, clock)
    about = machine(device)
    print(json.dumps({**about, **limits}, indent=2))
    results = []
    setting = Setting(kernels, device, dtype, LLAMA_8B if device.type == "cuda" else SMALL, with_compile)
    for name in chosen:
        for case in GROUPS[name](setting):
            results.append(row(case, measure(case, clock, options.samples), limits))
            print(line(results[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"kernels-{options.device}-{options.dtype}"
    document = {**about, **limits, "choices": dict(kernels.choices), "results": results}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    stem.with_suffix(".txt").write_text("\n".join(map(line, results)) + "\n")
    plot(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
