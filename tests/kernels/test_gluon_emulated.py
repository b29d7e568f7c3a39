"""Attention with specialised warps, its barriers and launches, in an emulator of Gluon; broken kernels are caught."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch

from megalite.kernels.attention import attention_reference
from megalite.kernels.attention.agreement import disagreement
from tests.kernels.suite.kernel_checks import compare

ours = pytest.importorskip("megalite.kernels.attention.flash_gluon", reason="no Triton, or one with another Gluon")
from megalite.kernels.attention import flash_gluon_backward_kernels as BACKWARD  # noqa: E402
from megalite.kernels.attention import flash_gluon_kernels as KERNELS  # noqa: E402
from megalite.kernels.attention import flash_triton  # noqa: E402
from tests.kernels import gluon_emulator  # noqa: E402

LSE = {"return_lse": True}


def tensors(queries, keys, heads, kv_heads, width, dtype=torch.bfloat16, batch=1):
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(length, batch, count, width).to(dtype) for length, count in sizes]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """The kernels in the emulator; the preparation of the backward, which is Triton's, as its formula."""
    monkeypatch.setattr(ours, "forward_kernel", gluon_emulator.Emulated(KERNELS, "forward_kernel"))
    for name in ("dkdv_kernel", "dq_kernel"):
        monkeypatch.setattr(ours, name, gluon_emulator.Emulated(BACKWARD, name))
    monkeypatch.setattr(flash_triton, "deltas", deltas)


def deltas(out, dout, dlse, lse):
    common = (out.float() * dout.float()).sum(-1).permute(1, 2, 0)
    return (common if dlse is None else common - dlse).contiguous()


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


GRADIENTS = [
    ((150, 150, 6, 2, 64), LSE),
    ((65, 300, 2, 2, 128), {"causal": False, **LSE}),
    ((130, 700, 2, 1, 64), {"window": 100, **LSE}),  # keys that nobody sees
    ((200, 90, 1, 1, 128), {}),  # rows that see nothing
    ((300, 300, 2, 1, 64), {"documents": 70, "window": 60}),
    ((129, 129, 1, 1, 128), {"documents": 40, "causal": False, "scale": 0.3}),
]


@pytest.mark.parametrize(("sizes", "options"), GRADIENTS)
def test_gradients_of_all_that_comes_out(sizes, options):
    dtype, batch = random.choice([torch.bfloat16, torch.float16]), random.choice([1, 2])
    if "documents" in options:
        numbers = torch.randint(0, sizes[1], (sizes[1], batch)).sort(0).values // options["documents"]
        options = {**options, "documents": numbers}
    forms = (lambda *x: ours.attention(*x, **options)), (lambda *x: attention_reference(*x, **options))
    compare(*forms, tensors(*sizes, dtype, batch), dtype, factor=1.5)


def test_gradients_of_views_and_of_outputs_that_no_descriptor_can_stand_for():
    fused = torch.randn(100, 2, 4 * 64).bfloat16().requires_grad_()
    parts = [part.unflatten(-1, (-1, 64)) for part in fused.split([128, 64, 64], -1)]
    upstream = torch.randn(2, 100, 2, 64).bfloat16()
    for of in (lambda x: (x.transpose(0, 1) * upstream).sum(), torch.sum):  # rows at 128 bytes; one number for all
        got, exact = (torch.autograd.grad(of(form(*parts)), fused) for form in (ours.attention, attention_reference))
        assert (got[0] - exact[0]).float().norm() < 0.015 * exact[0].float().norm()


def test_bits_of_gradients_depend_on_no_order():
    """Programs run in a random order, and their partitions at random times."""
    given = [x.requires_grad_() for x in tensors(130, 300, 4, 2, 64)]
    out = ours.attention(*given)
    upstream = torch.randn_like(out)
    first, *others = (torch.autograd.grad(out, given, upstream, retain_graph=True) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_wide_heads_have_the_other_backward(monkeypatch):
    asked = []
    monkeypatch.setattr(flash_triton, "_backward", lambda *given: asked.append(given) or given[2:5])
    given = [x.requires_grad_() for x in tensors(64, 70, 1, 1, 256)]
    torch.autograd.grad(ours.attention(*given).sum(), given)
    assert len(asked) == 1 and asked[0][-1] == 0.0


BROKEN = [
    ("_span", "mbarrier.wait(filled.index(slot), (n // STAGES) & 1)", ""),  # scores of keys that are not there yet
    ("_load", "mbarrier.wait(free.index(slot), phase ^ 1)", ""),  # keys written over others that are being read
    ("_load", "mbarrier.wait(free.index(slot), phase ^ 1)", "mbarrier.wait(free.index(slot), phase)"),  # nobody begins
    ("_span", "mbarrier.arrive(free.index(STAGES + last))", ""),  # the producer waits for ever
    ("_span", "warpgroup_mma_wait(1, deps=[s_MN])", "warpgroup_mma_wait(2, deps=[s_MN])"),
    ("_consume", "    fence_async_shared()\n    tma.async", "    tma.async"),
    ("seen_keys", "gl.maximum(here + 1, 0)", "gl.maximum(here + 2, 0)"),
]


def broken_copy(module, function, old, new, tmp_path, monkeypatch):
    """The module with `old` in one of its functions made `new`."""
    head, name, rest = Path(module.__file__).read_text().partition(f"def {function}(")
    body, end, tail = rest.partition("\n@gluon.jit\n")
    assert body.count(old) == 1
    file = tmp_path / "broken_kernels.py"
    source = head + name + body.replace(old, new) + end + tail
    file.write_text(source.replace("from .", "from megalite.kernels.attention."))
    spec = importlib.util.spec_from_file_location("broken_kernels", file)
    broken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "broken_kernels", broken)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(gluon_emulator, "WAIT", 1.0)
    return broken


@pytest.mark.parametrize(("function", "old", "new"), BROKEN)
def test_a_broken_kernel_is_caught(function, old, new, tmp_path, monkeypatch):
    broken = broken_copy(KERNELS, function, old, new, tmp_path, monkeypatch)
    monkeypatch.setattr(gluon_emulator, "LATENCY", 0.05)  # long enough that a missing wait is seen on a busy machine
    monkeypatch.setattr(ours, "forward_kernel", gluon_emulator.Emulated(broken, "forward_kernel"))
    given = tensors(128, 600, 1, 1, 64)
    with torch.no_grad():
        try:
            fault = disagreement(ours.attention, given, LSE)
        except (AssertionError, RuntimeError) as error:
            fault = str(error) or type(error).__name__
    assert fault, "nobody noticed"


FILLED, FREE = (
    "mbarrier.wait(filled.index(slot), (n // STAGES) & 1)",
    "mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)",
)
LAST_WAIT, LEFT = "dv_ND, dk_ND = warpgroup_mma_wait(0, deps=[dv_ND, dk_ND])", "mbarrier.arrive(free.index(slot))"
NEXT = "\n        "
BROKEN_BACKWARD = [
    ("_consume_queries", FILLED, ""),  # queries that are not there yet
    ("_consume_keys", FILLED, ""),
    ("_consume_queries", FILLED, FILLED.replace("& 1)", "& 1 ^ 1)")),
    ("_feed_queries", FREE, ""),  # queries written over others that are being read
    ("_feed_keys", FREE, ""),
    ("_feed_keys", "& 1) ^ 1)", "& 1))"),  # nobody begins
    ("_consume_queries", "mbarrier.wait(own, 0)", ""),
    ("_consume_keys", "mbarrier.wait(own, 0)", ""),
    ("_consume_queries", "warpgroup_mma_wait(1, deps=[dp_NM])", "warpgroup_mma_wait(2, deps=[dp_NM])"),
    ("_consume_keys", "warpgroup_mma_wait(1, deps=[s_MN])", "warpgroup_mma_wait(2, deps=[s_MN])"),
    ("_consume_queries", LAST_WAIT + NEXT + LEFT, LEFT + NEXT + LAST_WAIT),  # left while a product reads it
    ("_consume_keys", LEFT, ""),
    ("_consume_queries", "fence_async_shared()", ""),
    ("_consume_keys", "fence_async_shared()", ""),
    ("_feed_queries", "mbarrier.arrive(filled.index(slot))", ""),  # log-sum-exps of which no consumer hears
    ("_feed_keys", "mbarrier.wait(done.index(part), 0)", ""),  # stored before it was computed
    ("_consume_queries", "mbarrier.arrive(done.index(PART))", ""),
    ("_seeing_queries", "gl.maximum(here, 0)", "gl.maximum(here - 1, 0)"),
    ("_walk", "- begin + STEP - 1) // STEP\n    whole_to", "- begin) // STEP\n    whole_to"),  # a mask that is left out
    ("_walk", "- begin) // STEP", "- begin) // STEP + 1"),
    ("dkdv_kernel", "store(lo - begin)", "store(lo)"),
    (
        "_in_base_2",
        'gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)',
        "lse * LOG2E",
    ),  # NaN where none is seen
    ("_feed_queries", "do_column + member * do_stride_h", "do_column"),
    ("dkdv_kernel", "head = kv_head * group", "head = kv_head"),
]


@pytest.mark.parametrize(("function", "old", "new"), BROKEN_BACKWARD)
def test_a_broken_backward_is_caught(function, old, new, tmp_path, monkeypatch):
    broken = broken_copy(BACKWARD, function, old, new, tmp_path, monkeypatch)
    monkeypatch.setattr(gluon_emulator, "LATENCY", 0.003)
    assert any(wrong_gradients(broken, *sizes, monkeypatch) for sizes in ((200, 450), (200, 90))), "nobody noticed"


def test_the_backward_as_it_is_passes_for_whole(monkeypatch):
    assert not any(wrong_gradients(BACKWARD, *sizes, monkeypatch) for sizes in ((200, 450), (200, 90)))


def wrong_gradients(broken, queries, keys, monkeypatch):
    given = [x.requires_grad_() for x in tensors(queries, keys, 4, 2, 64)]
    out, reference = (form(*given) for form in (ours.attention, attention_reference))
    upstream = torch.randn_like(out)
    for name in ("dkdv_kernel", "dq_kernel"):
        monkeypatch.setattr(ours, name, gluon_emulator.Emulated(broken, name))
    try:
        got, exact = (torch.autograd.grad(x, given, upstream) for x in (out, reference))
    except (AssertionError, RuntimeError):
        return True
    return any(not (a - b).float().norm() < 0.015 * b.float().norm() for a, b in zip(got, exact, strict=True))


def test_the_reference_itself_is_not_what_is_emulated():
    """The emulated kernel is run: its output differs from the reference's in the last bits."""
    given = tensors(130, 130, 1, 1, 64)
    with torch.no_grad():
        assert not torch.equal(ours.attention(*given), attention_reference(*given))
