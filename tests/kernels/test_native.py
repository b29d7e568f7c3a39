"""The compiled CPU kernels, for every set of instructions that this processor has, against the plain forms in float64.

Torch fills what `empty` gives with NaN here, so that an element left unwritten is seen.
"""

import importlib
import inspect
import logging

import pytest
import torch
from torch.testing import assert_close

from megalite.kernels import cross_entropy, dispatch, native, rms_norm, rope, select_kernels, swiglu
from megalite.kernels.attention import Options, attention_reference
from megalite.kernels.attention.cpu import first_keys

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle())),
]
CPU = torch.device("cpu")
USABLE = [] if native.obstacle() else native.extension().usable
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_buffers():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=USABLE)
def instructions(request, monkeypatch):
    chosen = getattr(native.extension(), request.param)
    monkeypatch.setattr(native, "variant", lambda: chosen)
    return request.param


def values_and_gradients(function, inputs, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def compare(function, plain, *inputs, dtype, limit=1.0):
    """In `dtype` against float64, on inputs that bf16 holds; `limit` times what rounding alone explains."""
    inputs = [x.detach().bfloat16() for x in inputs]
    got = values_and_gradients(function, inputs, dtype)
    for one, other in zip(got, values_and_gradients(plain, inputs, torch.float64), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-6)
        assert error <= limit * (1e-6 if dtype == torch.float32 else 1.2e-2), (one.shape, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 129), (65, 2, 37), (200, 64), (0, 8)])
def test_norms(instructions, dtype, shape):
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    compare(
        lambda x, w: native.rms_norm(x, w, 1e-3), lambda x, w: rms_norm.rms_norm(x, w, 1e-3), x, weight, dtype=dtype
    )
    forms = ((lambda *all, m=module: m.add_rms_norm(*all, 1e-3)) for module in (native, rms_norm))
    compare(*forms, x, residual, weight, dtype=dtype)


def test_bf16_is_rounded_where_the_specification_rounds(instructions):
    """A sum to the bit, ties included; the others but for a statistic's last bit."""
    x, residual, weight = (
        torch.randn(3, 200, 64).bfloat16(),
        torch.randn(200, 64).bfloat16(),
        torch.randn(64).bfloat16(),
    )
    total, normed = native.add_rms_norm(x[0], residual, weight, 1e-5)
    assert torch.equal(total, x[0] + residual)
    assert (normed == rms_norm.rms_norm(total, weight, 1e-5)).double().mean() > 0.99
    assert (native.swiglu(x[1]) == swiglu.swiglu(x[1])).double().mean() > 0.99
    q, cos = x.view(3, 200, 4, 16), torch.randn(3, 16)
    assert (native.rope(q, q, cos, cos)[0] == rope.rope(q, q, cos, cos)[0]).double().mean() > 0.99


@pytest.mark.parametrize("used", [0, 1])
def test_a_sum_of_which_one_result_alone_is_used(instructions, used):
    x, residual, weight = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8).bfloat16()

    def form(module):
        return lambda x, residual: module.add_rms_norm(x, residual, weight.to(x.dtype), 1e-3)[used]

    compare(form(native), form(rms_norm), x, residual, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "rotated"), [(2, 2), (64, 64), (80, 80), (48, 20)])
def test_rotation(instructions, dtype, width, rotated):
    """q and k as views of a fused projection, one table for all sequences and one for each."""
    fused = torch.randn(9, 3, 7, width)
    for shape in ((9, rotated), (9, 3, rotated)):
        cos, sin = torch.randn(shape), torch.randn(shape)

        def turn(fused, module, cos=cos, sin=sin):
            return module.rope(*fused.split((4, 3), 2), cos, sin)

        compare(lambda x: turn(x, native), lambda x: turn(x, rope), fused, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(instructions, dtype):
    compare(native.swiglu, swiglu.swiglu, 4 * torch.randn(5, 3, 74), dtype=dtype)
    strided = torch.randn(6, 40)[::2, :]
    compare(lambda x: native.swiglu(x[:, 3:37]), lambda x: swiglu.swiglu(x[:, 3:37]), strided, dtype=dtype)
    x, grad = torch.randn(5, 74, dtype=dtype, requires_grad=True), torch.randn(5, 40, dtype=dtype)[:, 3:]
    again = native.swiglu_again(grad, x.detach())
    assert all(map(torch.equal, again, (native.swiglu(x), torch.autograd.grad(native.swiglu(x), x, grad)[0])))


def test_the_exponential_from_end_to_end_of_its_range(instructions):
    """Through silu(g) = g / (1 + e^-g): large and small arguments, infinities, and a NaN that stays one."""
    gate = torch.cat([torch.linspace(-95, 95, 100_001), torch.tensor([1e30, -1e30, torch.inf])])
    gate_up = torch.stack([gate, torch.ones_like(gate)], -1)
    expected = torch.nn.functional.silu(gate.double())
    got = native.swiglu(gate_up).squeeze(-1)
    assert_close(got.double(), expected, rtol=5e-7, atol=1e-36)
    assert native.swiglu(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "valid"), [(0, 21), (20, 17), (30, 0)])
def test_cross_entropy(instructions, dtype, start, valid):
    """A whole vocabulary, a shard with padded columns and one of nothing else; an ignored row of infinities."""
    logits = (4 * torch.randn(9, 23)).to(dtype)[:, :21]
    logits[2] = torch.inf
    targets, scale = torch.randint(0, 40, (9,)), torch.rand(9)
    targets[2], scale[2] = -100, 0.0
    wide = logits.double()
    place = {"vocab_start": start, "valid": valid}
    stats = native.cross_entropy_stats(logits, targets, **place)
    wide_stats = cross_entropy.cross_entropy_stats(wide, targets, **place)
    assert_close(stats.double(), wide_stats, rtol=1e-5, atol=1e-5, equal_nan=True)
    options = {**place, "z_loss": 0.01}
    whole = torch.stack([wide_stats[:, 0].clamp(-50, 50), *wide_stats[:, 1:].unbind(-1)], -1)
    whole[:, 1].clamp_(min=1.0)
    native.cross_entropy_grad_(logits, targets, whole.float(), scale, **options)
    cross_entropy.cross_entropy_grad_(wide, targets, whole, scale.double(), **options)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert_close(logits.double(), wide, rtol=tolerance, atol=tolerance)
    assert not logits[2].any() and not logits[:, valid:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_in_one_pass(instructions, dtype):
    logits = (4 * torch.randn(70, 1031)).to(dtype)
    targets, scale = torch.randint(0, 1029, (70,)), torch.rand(70) / 70
    targets[::9] = -100
    scale[::9] = 0
    wide = logits.double()
    options = {"valid": 1029, "z_loss": 0.01}
    stats = native.cross_entropy_stats_grad_(logits, targets, scale, **options)
    expected = cross_entropy.cross_entropy_stats_grad_(wide, targets, scale.double(), **options)
    assert_close(stats.double(), expected, rtol=1e-5, atol=1e-4)
    assert (logits.double() - wide).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * wide.norm()
    assert native.cross_entropy_stats(torch.tensor([[1.0, torch.nan]]), torch.tensor([0]))[0, 1].isnan()


CASES = [
    (40, 4, 2, 32, None, False),
    (75, 6, 3, 24, 21, False),
    (140, 8, 1, 48, None, True),
    (33, 2, 2, 16, 5, True),
    (17, 2, 1, 80, None, False),
    (200, 3, 3, 128, 64, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "heads", "kv_heads", "width", "window", "packed"), CASES)
def test_attention(instructions, dtype, length, heads, kv_heads, width, window, packed):
    """Grouped heads, windows and documents, and heads that fill no whole register; views of a fused projection."""
    fused = torch.randn(length, 2, heads + 2 * kv_heads, width)
    documents = (torch.rand(length, 2) < 0.05).cumsum(0) if packed else None
    first = first_keys(length, Options(window=window, documents=documents))
    options = {"scale": 0.3, "window": window, "documents": documents}

    def split(fused):
        return fused.split((heads, kv_heads, kv_heads), 2)

    compare(
        lambda x: native.attention(*split(x), first, 0.3),
        lambda x: attention_reference(*split(x), **options),
        fused,
        dtype=dtype,
        limit=2.0 if dtype == torch.float32 else 1.0,
    )


def test_one_token_sees_itself():
    q, k, v = (torch.randn(1, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = native.attention(q, k, v, None, 1.0)
    assert_close(out, v.repeat_interleave(2, 2))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert_close(grads, (torch.zeros_like(q), torch.zeros_like(k), torch.full_like(v, 2.0)), atol=1e-6, rtol=0)


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight = torch.randn(1000, 256), torch.randn(256)
    q, k, v = (torch.randn(80, 3, heads, 32) for heads in (4, 2, 2))
    logits, targets, scale = torch.randn(200, 999), torch.randint(0, 999, (200,)), torch.rand(200)

    def all_of_them():
        made = values_and_gradients(lambda *both: native.rms_norm(*both, 1e-5), (x, weight), torch.float32)
        made += values_and_gradients(native.swiglu, (x,), torch.float32)
        made += values_and_gradients(lambda *three: native.attention(*three, None, 0.2), (q, k, v), torch.float32)
        written = logits.clone()
        return [*made, native.cross_entropy_stats_grad_(written, targets, scale), written]

    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(all_of_them())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_training_takes_them_on_a_cpu():
    """Attention too, where it is causal and has as many queries as keys."""
    kernels = select_kernels({}, CPU)
    for operation in ("rms_norm", "rope", "swiglu", "cross_entropy"):
        assert kernels.choices[operation] == "native (auto: no GPU)"
    assert kernels.choices["attention"] == "cpu (auto: no GPU; compiled or PyTorch, by dtype and width)"
    q, kv = torch.randn(6, 1, 4, 8, requires_grad=True), torch.randn(6, 1, 2, 8)
    assert type(kernels.attention(q, kv, kv).grad_fn).__name__ == "_AttentionBackward"
    for options in ({"causal": False}, {"softcap": 2.0}):
        assert type(kernels.attention(q, kv, kv, **options).grad_fn).__name__ != "_AttentionBackward"
    assert type(kernels.attention(q[:3], kv, kv).grad_fn).__name__ != "_AttentionBackward"


def test_what_they_cannot_take_goes_to_the_plain_form_and_is_told_once(caplog):
    kernels = select_kernels({}, CPU)
    x = torch.randn(3, 8, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "megalite.kernels"):
        for _ in range(2):
            assert torch.equal(kernels.swiglu(x), swiglu.swiglu(x))
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == [
        "kernels.swiglu: PyTorch instead of the compiled CPU kernel for this call: torch.float64 input"
    ]


def test_what_has_no_kernel_is_told_once(caplog):
    kernels, x = select_kernels({}, CPU), torch.randn(3, 8)
    with caplog.at_level(logging.WARNING, "megalite.kernels"):
        for _ in range(2):
            assert torch.equal(kernels.geglu(x), swiglu.geglu(x))
    assert [each.getMessage() for each in caplog.records] == [
        "kernels.geglu: PyTorch instead of the compiled CPU kernel for this call: there is no such kernel"
    ]


def test_without_the_extension_the_plain_forms_say_why(monkeypatch):
    monkeypatch.setattr(native, "obstacle", lambda: "the CPU kernels were not built: no such file")
    kernels = select_kernels({}, CPU)
    assert kernels.choices["rope"] == "reference (auto: no GPU, and the CPU kernels were not built: no such file)"
    assert kernels.rope is rope.rope
    assert kernels.choices["attention"] == "cpu (auto: no GPU, and the CPU kernels were not built: no such file)"
    q = torch.randn(6, 1, 4, 8, requires_grad=True)
    assert type(kernels.attention(q, q, q).grad_fn).__name__ != "_AttentionBackward"


def test_signatures_are_those_of_the_plain_forms():
    for operation in ("rms_norm", "rope", "swiglu", "cross_entropy"):
        for name in set(dispatch.OPERATIONS[operation]) - set(dispatch.PLAIN_ALONE):
            plain = getattr(importlib.import_module(f"megalite.kernels.{operation}"), name)
            assert inspect.signature(getattr(native, name)) == inspect.signature(plain), name
