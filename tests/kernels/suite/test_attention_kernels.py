"""Flash attention in Triton, forward and backward, against the float64 reference."""

import pytest
import torch
from torch import Tensor

from megalite.kernels.attention import Documents, attention_reference, visible_keys
from megalite.kernels.attention import flash_triton as ours
from tests.kernels.attention_part_checks import check as check_parts
from tests.kernels.suite.kernel_checks import compare

DTYPES = [torch.float32, torch.bfloat16]


def inputs(device, queries, keys, batch, heads, kv_heads, width, dtype=torch.float32) -> list[Tensor]:
    shapes = [(queries, batch, heads, width), (keys, batch, kv_heads, width), (keys, batch, kv_heads, width)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def check(tensors: list[Tensor], factor: float = 1.0, **options) -> None:
    dtype = tensors[0].dtype
    compare(
        lambda q, k, v: ours.attention(q, k, v, **options),
        lambda q, k, v: attention_reference(q, k, v, **options),
        tensors,
        dtype,
        factor=factor,
    )


@pytest.fixture(params=["pointers", "descriptors"])
def path(request, monkeypatch):
    """Both ways to read tiles; a device that cannot take descriptors is skipped."""
    if request.param == "descriptors" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    monkeypatch.setattr(ours, "descriptors_fit", lambda *tensors: request.param == "descriptors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "width"),
    [(97, 97, 4, 2, 64), (130, 130, 1, 1, 40), (33, 80, 3, 1, 96), (80, 45, 2, 2, 32), (1, 70, 2, 1, 16)],
)
def test_causal(device, path, dtype, queries, keys, heads, kv_heads, width):
    """Odd lengths and widths, grouped heads, fewer queries than keys and more (rows that see nothing)."""
    check(inputs(device, queries, keys, 2, heads, kv_heads, width, dtype), factor=1.5, causal=True)


@pytest.mark.parametrize("options", [{"causal": False}, {"window": 2}, {"window": 29}, {"causal": False, "window": 40}])
def test_windows(device, options):
    check(inputs(device, 100, 100, 1, 2, 1, 32), **options)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"scale": 0.5}, {"softcap": 1.0, "window": 20, "causal": True}])
def test_softcap_and_scale(device, options):
    check(inputs(device, 70, 70, 1, 2, 2, 24), factor=2, **options)


@pytest.mark.parametrize("width", [160, 256, 59])
def test_wide_and_odd_heads(device, width):
    check(inputs(device, 40, 40, 1, 2, 1, width, torch.bfloat16), factor=1.5)


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", [ours.AMPERE, ours.SMALL])
def test_tiles_of_other_devices(device, monkeypatch, width, kind):
    """Tiles by which a device with less shared memory computes; each is fit for one with more."""
    monkeypatch.setattr(ours, "kind_of_device", lambda device: kind)
    check(inputs(device, 137, 137, 1, 2, 1, width, torch.bfloat16), factor=1.5, window=70)


@pytest.mark.parametrize(
    ("causal", "queries", "window"), [(True, 110, None), (False, 110, 17), (False, 30, None), (True, 30, 17)]
)
def test_documents(device, causal, queries, window):
    """Documents cut anywhere, differently in every batch entry, one of them a single token."""
    documents = torch.randint(0, 110, (110, 2), device=device).sort(0).values // 23
    documents[50, 0] = 99
    check(inputs(device, queries, 110, 2, 2, 1, 32), documents=documents, causal=causal, window=window)


def test_tables_of_documents_are_made_once_for_all_layers(device, monkeypatch):
    """`Documents` shared by two layers and another window; both give what a plain tensor gives."""
    made = []
    intervals = ours.document_intervals
    monkeypatch.setattr(ours, "document_intervals", lambda *a: made.append(a[3]) or intervals(*a))
    tensors = inputs(device, 40, 40, 2, 2, 1, 16)
    numbers = torch.randint(0, 40, (40, 2), device=device).sort(0).values // 9
    shared = Documents(numbers)
    for window in (None, None, 7):
        mine = ours.attention(*tensors, documents=shared, window=window)
        assert torch.equal(mine, ours.attention(*tensors, documents=numbers, window=window))
    assert made == [None, None, None, 7, 7]


def test_a_row_sees_only_its_document(device):
    """Keys of other documents hold NaN in another document's rows only: the packed result equals each alone."""
    q, k, v = inputs(device, 64, 64, 1, 2, 1, 32)
    documents = (torch.arange(64, device=device) >= 37).long()[:, None]
    packed = ours.attention(q, k, v, documents=documents)
    alone = [ours.attention(q[s], k[s], v[s]) for s in (slice(0, 37), slice(37, 64))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_log_sum_exp_and_its_gradient(device):
    """What ring attention needs: lse in fp32, -inf where a row sees nothing, differentiable beside the output."""
    check(inputs(device, 60, 60, 2, 2, 1, 32), return_lse=True)
    out, lse = ours.attention(*inputs(device, 20, 12, 1, 2, 1, 32), return_lse=True)
    assert (lse[..., :8] == -torch.inf).all() and lse[..., 8:].isfinite().all() and (out[:8] == 0).all()


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"packed": True, "window": 11}, {"softcap": 1.5}])
def test_parts_of_the_keys(device, path, options):
    """What context parallelism needs: some queries and some keys of a sequence, by tables of intervals."""
    for dtype in DTYPES:
        check_parts(
            ours.FlashParts(), dtype=dtype, device=device, limit=1e-2 if dtype.itemsize == 2 else 2e-6, **options
        )


def test_views_of_a_fused_projection_and_odd_gradients(device):
    """q, k, v inside one [S, B, (H + 2K) D] tensor; the gradient arrives transposed, then expanded."""

    def run(op, qkv, weights):
        q, k, v = (part.unflatten(-1, (-1, 32)) for part in qkv.split([4 * 32, 2 * 32, 2 * 32], -1))
        out = op(q, k, v)
        return (out.permute(1, 2, 3, 0) * weights).sum() + out.sum()

    weights = torch.randn(2, 4, 32, 50, device=device)
    compare(
        lambda qkv: run(ours.attention, qkv, weights),
        lambda qkv: run(attention_reference, qkv, weights.double()),
        (torch.randn(50, 2, 8 * 32, device=device),),
        torch.float32,
        factor=2,
    )


def test_gradients_repeat_bitwise(device):
    tensors = [x.requires_grad_() for x in inputs(device, 90, 90, 1, 4, 2, 32, torch.bfloat16)]
    upstream = torch.randn(90, 1, 4, 32, device=device).bfloat16()
    runs = 2 if device.type == "cpu" else 30
    results = [torch.autograd.grad(ours.attention(*tensors), tensors, upstream) for _ in range(runs)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


SHAPES = [  # queries, keys, heads, kv heads, width, options
    *((length, length, 8, 2, width, {}) for length in (113, 1023, 2048) for width in (64, 96, 128, 256)),
    *((217, 217, 4, 4, width, {}) for width in (32, 40, 59, 80, 111, 160, 192, 224)),
    (203, 1024, 6, 3, 128, {}),
    (1024, 203, 6, 1, 128, {}),
    (1, 799, 8, 8, 128, {}),
    (799, 3, 8, 2, 64, {}),
    (1025, 1025, 8, 2, 128, {"window": 200}),
    (500, 500, 8, 2, 128, {"causal": False}),
    (500, 500, 8, 2, 128, {"softcap": 5.0}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys", "heads", "kv_heads", "width", "options"), SHAPES)
def test_error_is_at_most_twice_torchs(
    device, path, queries, keys, heads, kv_heads, width, options, record_property
):  # fmt: skip
    """FlashAttention's rule: max error against fp32 at most twice that of the plain bf16 formula."""
    if device.type == "cpu":
        pytest.skip("long; the interpreter has the same bound at short lengths")
    check_the_rule(
        ours.attention,
        inputs(device, queries, keys, 2, heads, kv_heads, width, torch.bfloat16),
        options,
        record_property,
    )


def check_the_rule(attention, tensors, options, record_property):
    upstream = torch.randn_like(tensors[0])

    def run(op, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact, torchs = (run(lambda *x: plain_formula(*x, **options), dtype) for dtype in (torch.float32, torch.bfloat16))
    got = run(lambda *x: attention(*x, **options), torch.bfloat16)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), exact, torchs, got):
        error, theirs = (c.float() - a).abs().max().item(), (b.float() - a).abs().max().item()
        record_property(f"{name} error over torch's", round(error / max(theirs, 1e-30), 3))
        assert error <= 2 * theirs + 1e-5, f"{name}: {error:.2e}, torch's own {theirs:.2e}"


def plain_formula(q, k, v, *, causal=True, window=None, softcap=None):
    """Attention in the inputs' dtype throughout, as torch computes it when it is written out."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible_keys(q.shape[0], k.shape[0], causal=causal, window=window, device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", p if mask is None else p.where(mask.any(-1, keepdim=True), 0), v)


def test_the_plain_formula_is_the_reference(device):
    """What the rule compares with is the same attention."""
    for options in ({}, {"causal": False}, {"window": 5}, {"softcap": 2.0}):
        tensors = [x.double() for x in inputs(device, 20, 12, 1, 4, 2, 8)]
        torch.testing.assert_close(plain_formula(*tensors, **options), attention_reference(*tensors, **options))
