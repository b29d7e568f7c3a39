"""The forward with specialised warps, its barriers and its launch, in an emulator of Gluon; broken ones are caught."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch

from megalite.kernels.attention import attention_reference
from megalite.kernels.attention.agreement import disagreement

ours = pytest.importorskip("megalite.kernels.attention.flash_gluon", reason="no Triton, or one with another Gluon")
from megalite.kernels.attention import flash_gluon_kernels as KERNELS  # noqa: E402
from tests.kernels import gluon_emulator  # noqa: E402

LSE = {"return_lse": True}


def tensors(queries, keys, heads, kv_heads, width, dtype=torch.bfloat16, batch=1):
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(length, batch, count, width).to(dtype) for length, count in sizes]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(ours, "forward_kernel", gluon_emulator.Emulated(KERNELS, "forward_kernel"))


CASES = [
    ((150, 150, 2, 1, 64), {}),
    ((130, 700, 1, 1, 64), {"window": 100}),
    ((65, 300, 2, 2, 128), {"causal": False}),
    ((200, 90, 1, 1, 128), {}),  # rows that see nothing
    ((300, 300, 1, 1, 64), {"documents": True, "window": 60}),
    ((64, 70, 1, 1, 256), {"scale": 0.2}),
]


@pytest.mark.parametrize(("sizes", "options"), CASES)
def test_output_and_log_sum_exp(sizes, options):
    dtype, batch = random.choice([torch.bfloat16, torch.float16]), random.choice([1, 2])
    if "documents" in options:
        numbers = torch.randint(0, sizes[1], (sizes[1], batch)).sort(0).values // 70
        options = {**options, "documents": numbers}
    with torch.no_grad():
        assert disagreement(ours.attention, tensors(*sizes, dtype, batch), {**options, **LSE}) is None


def test_views_of_a_fused_projection_are_read_in_place(monkeypatch):
    """And what a descriptor cannot stand for is copied: rows that are not aligned, or batch first."""
    fused = torch.randn(100, 2, 4 * 64).bfloat16()
    views = [part.unflatten(-1, (-1, 64)) for part in fused.split([128, 64, 64], -1)]
    assert all(map(ours.readable, views))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    odd = [torch.randn(100, 2, n * 64 + 1).bfloat16()[..., 1:].unflatten(-1, (n, 64)) for n in (2, 1, 1)]
    assert not any(map(ours.readable, [*turned, *odd]))
    with torch.no_grad():
        for given in (views, turned, odd):
            assert disagreement(ours.attention, tuple(given), {}) is None


def test_what_it_does_not_do_is_refused():
    fits = tensors(64, 64, 1, 1, 64)
    assert ours.unsupported(*fits) is None and ours.unsupported(*fits, window=3, causal=False) is None
    for given, options, reason in (
        (tensors(64, 64, 1, 1, 64, torch.float32), {}, "dtype"),
        (tensors(64, 64, 1, 1, 80), {}, "head dim 80"),
        (tensors(63, 64, 1, 1, 64), {}, "63 queries"),
        (tensors(64, 0, 1, 1, 64), {}, "0 keys"),
        (fits, {"softcap": 2.0}, "soft cap"),
        (fits, {"scale": -1.0}, "not positive"),
    ):
        assert reason in ours.unsupported(*given, **options)


BROKEN = [
    ("mbarrier.wait(filled.index(slot), (n // STAGES) & 1)", "", 1),  # scores of keys that are not there yet
    ("mbarrier.wait(free.index(slot), phase ^ 1)", "", 1),  # keys written over others that are being read
    ("mbarrier.wait(free.index(slot), phase ^ 1)", "mbarrier.wait(free.index(slot), phase)", 1),  # nobody begins
    ("mbarrier.arrive(free.index(STAGES + last))", "", 1),  # the producer waits for ever
    ("warpgroup_mma_wait(1, deps=[s_MN])", "warpgroup_mma_wait(2, deps=[s_MN])", 1),
    ("    fence_async_shared()\n    tma.async", "    tma.async", 1),
    ("hi = gl.minimum(gl.maximum(here + 1, 0), keys)", "hi = gl.minimum(gl.maximum(here + 2, 0), keys)", 1),
]


@pytest.mark.parametrize(("old", "new", "times"), BROKEN)
def test_a_broken_kernel_is_caught(old, new, times, tmp_path, monkeypatch):
    source = Path(KERNELS.__file__).read_text()
    assert source.count(old) == times
    file = tmp_path / "broken_kernels.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken_kernels", file)
    broken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "broken_kernels", broken)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(gluon_emulator, "WAIT", 2.0)
    monkeypatch.setattr(gluon_emulator, "LATENCY", 0.05)  # long enough that a missing wait is seen on a busy machine
    monkeypatch.setattr(ours, "forward_kernel", gluon_emulator.Emulated(broken, "forward_kernel"))
    given = tensors(128, 600, 1, 1, 64)
    with torch.no_grad():
        try:
            fault = disagreement(ours.attention, given, LSE)
        except (AssertionError, RuntimeError) as error:
            fault = str(error) or type(error).__name__
    assert fault, "nobody noticed"


def test_the_reference_itself_is_not_what_is_emulated():
    """The emulated kernel is run: its output differs from the reference's in the last bits."""
    given = tensors(130, 130, 1, 1, 64)
    with torch.no_grad():
        assert not torch.equal(ours.attention(*given), attention_reference(*given))
