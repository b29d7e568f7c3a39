"""Runs the kernels' suite in Triton's interpreter, in a process of its own: the mode is fixed when Triton is
imported."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = sorted(path.name for path in (ROOT / "tests/kernels/suite").glob("test_*.py"))

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("name", SUITE)
def test_in_the_interpreter(name: str) -> None:
    options = ("-q", "-x", "--tb=short", "-p", "no:cacheprovider")
    result = interpreted("-m", "pytest", *options, f"tests/kernels/suite/{name}")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "failed" not in result.stdout


OFFSETS = """
import torch
from megalite.kernels import cross_entropy_triton, rms_norm_triton, rope_triton, swiglu_triton
from megalite.kernels.attention import flash_triton as flash

STEP = 2**30 + 64  # the third row starts beyond 2^31 elements; only three rows of the memory are ever touched
memory = torch.empty(2 * STEP + 256)
rows = memory.as_strided((3, 64), (STEP, 1))
rows.normal_()
near = rows.clone()
upstream = memory.as_strided((3, 64), (STEP, 1), 128)  # gradients far apart as well
upstream.normal_()
def both_ways(op, x):
    # values and gradients, for the upstream gradient in far rows and in near ones
    x = x.detach().requires_grad_()
    y = op(x)
    far = upstream[..., : y.shape[-1]] if y.dim() == 2 else upstream.view_as(y)
    assert far.stride(0) == STEP
    return [y.detach(), *(torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in (far, far.clone()))]
def agree(op, far, near):
    first, second = both_ways(op, far), both_ways(op, near)
    for result in (*first[2:], *second[1:]):
        torch.testing.assert_close(result, first[1])
    torch.testing.assert_close(first[0], second[0])
weight, tables = torch.ones(64), (torch.randn(3, 32), torch.randn(3, 32))
heads, near_heads = rows.view(3, 1, 2, 32), near.view(3, 1, 2, 32)
agree(lambda x: rms_norm_triton.rms_norm(x, weight, 1e-5), rows, near)
agree(lambda x: rms_norm_triton.add_rms_norm(x, x, weight, 1e-5)[1], rows, near)
agree(swiglu_triton.swiglu, rows, near)
agree(lambda x: rope_triton.rope(x, x, *tables)[0], heads, near_heads)
targets = torch.tensor([1, 2, 3])
stats = cross_entropy_triton.cross_entropy_stats(rows, targets)
torch.testing.assert_close(stats, cross_entropy_triton.cross_entropy_stats(near, targets))
def attend(x):
    x = x.detach().requires_grad_()
    out = flash.attention(x, x, x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]
for a, b in zip(attend(heads), attend(near_heads)):
    torch.testing.assert_close(a, b)
for x in (rows, near):
    cross_entropy_triton.cross_entropy_grad_(x, targets, stats, torch.ones(3))
torch.testing.assert_close(rows, near)
print("far rows agree")
"""


def test_offsets_beyond_two_to_the_thirty_one() -> None:
    """Rows a gigaelement apart: a 32-bit offset wraps around and reads or writes outside the memory."""
    result = interpreted("-c", OFFSETS)
    assert result.returncode == 0 and "far rows agree" in result.stdout, result.stderr[-3000:]


def test_the_corrected_interpreter_rounds_bf16_as_torch(tmp_path: Path) -> None:
    """The correction itself: casts, sums, and products in bf16 give torch's bits."""
    script = """
import torch, triton, triton.language as tl
from tests.kernels.interpreter_bf16 import correct_bf16
correct_bf16()

@triton.jit
def kernel(a_ptr, b_ptr, wide_ptr, cast_ptr, sum_ptr, dot_ptr):
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(cast_ptr + at, tl.load(wide_ptr + at).to(tl.bfloat16))
    tl.store(sum_ptr + at, a + b)
    tl.store(dot_ptr + at, tl.dot(a, b))

tensors = [torch.randn(32, 32) for _ in range(3)]
a, b, wide = tensors[0].bfloat16(), tensors[1].bfloat16(), tensors[2]
cast, total, dot = torch.empty_like(a), torch.empty_like(a), torch.empty_like(wide)
kernel[(1,)](a, b, wide, cast, total, dot)
assert torch.equal(cast, wide.bfloat16()) and torch.equal(total, a + b)
torch.testing.assert_close(dot, a.float() @ b.float())
print("bits agree")
"""
    source = tmp_path / "probe.py"
    source.write_text(script)  # a kernel's source must be in a file
    result = interpreted(str(source))
    assert result.returncode == 0 and "bits agree" in result.stdout, result.stderr[-3000:]
