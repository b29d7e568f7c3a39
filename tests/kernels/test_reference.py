"""The plain PyTorch forms: against torch's own operators and gradcheck, and their selection by configuration."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megalite.config import KernelsConfig
from megalite.errors import UserError
from megalite.kernels import OPERATIONS, native, select_kernels
from megalite.kernels import cross_entropy as cross_entropy_file
from megalite.kernels import rms_norm as rms_norm_file
from megalite.kernels.adamw import adamw_, square_sum
from megalite.kernels.attention import attention_reference, blocked, reference, visible_keys
from megalite.kernels.attention.cpu import attention_cpu
from megalite.kernels.attention.sdpa import attention_sdpa
from megalite.kernels.cross_entropy import (
    add_product_,
    chunk_rows,
    cross_entropy_grad_,
    cross_entropy_loss,
    cross_entropy_stats,
    cross_entropy_stats_grad_,
    merge_stats,
)
from megalite.kernels.dispatch import PLAIN_ALONE
from megalite.kernels.layout import obstacle
from megalite.kernels.rms_norm import add_rms_norm, rms_norm
from megalite.kernels.rope import rope
from megalite.kernels.swiglu import geglu, swiglu, swiglu_again
from megalite.model.attention import Positions

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")
ADAMW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def test_rms_norm_is_torchs_in_fp32_and_llamas_in_bf16():
    x, weight = torch.randn(5, 48), torch.randn(48)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (48,), weight, 1e-5))
    narrow, scale = x.bfloat16(), weight.bfloat16()
    normalised = (narrow.float() * torch.rsqrt(narrow.float().square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(rms_norm(narrow, scale, 1e-5), normalised * scale)
    total, y = add_rms_norm(x, 2 * x, weight, 1e-5)
    assert torch.equal(total, 3 * x) or torch.allclose(total, 3 * x)
    torch.testing.assert_close(y, rms_norm(total, weight, 1e-5))


def test_rms_norm_backward_by_hand(monkeypatch):
    """In three pieces of rows, the last shorter; only x and one number a row are kept."""
    monkeypatch.setattr(rms_norm_file, "PIECE", 3 * 6)
    x, weight = torch.randn(4, 2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert gradcheck(lambda *both: rms_norm(*both, 1e-3), (x.requires_grad_(), weight.requires_grad_()))
    saved = rms_norm(x, weight, 1e-3).grad_fn.saved_tensors
    assert sum(tensor.numel() for tensor in saved) == x.numel() + weight.numel() + 8
    strided = torch.randn(4, 2, 12, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda both, w: rms_norm(both[..., 6:], w, 1e-3), (strided, weight))


def test_rope_is_a_rotation_of_pairs_half_a_head_apart():
    """As complex numbers: element i with element i + R/2, turned by the angle; the rest of the head passes through."""
    angle = torch.rand(6, 2, 4, dtype=torch.float64)
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    q, k = torch.randn(6, 2, 3, 12, dtype=torch.float64), torch.randn(6, 2, 1, 12, dtype=torch.float64)
    for x, turned in zip((q, k), rope(q, k, cos, sin)):
        z = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
        torch.testing.assert_close(turned, torch.cat([z.real, z.imag, x[..., 8:]], -1))
    assert gradcheck(lambda *both: rope(*both, cos, sin), (q.requires_grad_(), k.requires_grad_()))
    same = rope(q, k, cos[:, 0], sin[:, 0])[0][:, 0]
    torch.testing.assert_close(same, rope(q, k, cos, sin)[0][:, 0])


@pytest.mark.parametrize(("gated", "activation"), [(swiglu, F.silu), (geglu, partial(F.gelu, approximate="tanh"))])
def test_gated_activations_backward_by_hand(gated, activation):
    x = torch.randn(4, 3, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gated(x), activation(x[..., :5]) * x[..., 5:])
    assert gradcheck(gated, x)
    if gated is swiglu:
        grad = torch.randn(4, 3, 5, dtype=torch.float64)
        y, gradient = swiglu_again(grad, x.detach())
        assert torch.equal(y, gated(x)) and torch.equal(gradient, torch.autograd.grad(gated(x), x, grad)[0])
    saved = gated(x).grad_fn.saved_tensors
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("form", [attention_reference, attention_sdpa, attention_cpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "options"),
    [
        (40, 40, 32, {}),
        (40, 40, 128, {}),
        (40, 40, 128, {"window": 7}),
        (12, 40, 32, {"window": 9}),
        (40, 12, 32, {}),
        (40, 40, 64, {"causal": False, "scale": 0.3}),
        (30, 40, 32, {"documents": True}),
        (40, 40, 128, {"documents": True, "window": 5}),
        (20, 20, 32, {"softcap": 3.0}),
    ],
)
def test_attention_against_loops_over_the_definition(form, dtype, queries, keys, width, options):
    """One query at a time, with the visible keys written out."""
    q = torch.randn(queries, 2, 4, width).to(dtype)
    k, v = torch.randn(keys, 2, 2, width).to(dtype), torch.randn(keys, 2, 2, width).to(dtype)
    documents = torch.randint(0, 40, (keys, 2)).sort(0).values // 9 if options.pop("documents", False) else None
    out = form(q, k, v, documents=documents, **options)
    expected = torch.zeros(queries, 2, 4, width, dtype=torch.float64)
    scale, cap = options.get("scale", width**-0.5), options.get("softcap")
    for i in range(queries):
        here = i + keys - queries
        for b in range(2):
            seen = [
                j
                for j in range(keys)
                if (j <= here or not options.get("causal", True))
                and j > here - options.get("window", keys + queries)
                and (documents is None or documents[j, b] == documents[here, b])
            ]
            for h in range(4) if seen else ():
                scores = k[seen, b, h // 2].double() @ q[i, b, h].double() * scale
                scores = cap * torch.tanh(scores / cap) if cap else scores
                expected[i, b, h] = scores.softmax(0) @ v[seen, b, h // 2].double()
    limit = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert (out.double() - expected).norm() <= limit * expected.norm() + 1e-6


def test_attention_gradients_and_log_sum_exp():
    q = torch.randn(6, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(4, 1, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda *x: attention_reference(*x), (q, k, v))  # the first two queries see nothing
    _, lse = attention_reference(q, k, v, return_lse=True)
    assert (lse[..., :2] == -torch.inf).all()
    torch.testing.assert_close(lse[0, 0, 5], ((k[:, 0, 0] @ q[5, 0, 0]) * 8**-0.5).logsumexp(0))


@pytest.mark.parametrize("options", [{}, {"window": 21}, {"documents": True}, {"documents": True, "window": 40}])
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(8, 1, 75), (6, 3, 140), (4, 2, 33)])
def test_attention_in_blocks_has_the_gradients_of_the_definition(heads, kv_heads, length, options, monkeypatch):
    """Several blocks of queries, and tiles of fewer heads than there are, in float64 against autograd."""
    monkeypatch.setattr(blocked, "TILE_ELEMENTS", 3 * 64 * length * heads // kv_heads)
    monkeypatch.setattr(blocked, "TILE_ROWS", 64 * heads // kv_heads)
    q, k, v = (torch.randn(length, 2, n, 8).double().requires_grad_() for n in (heads, kv_heads, kv_heads))
    documents = (torch.rand(length, 2) < 0.05).cumsum(0) if options.get("documents") else None
    options = {"causal": True, "window": options.get("window"), "documents": documents}
    plain = documents is None and options["window"] is None
    mask = None if plain else visible_keys(length, length, **options)
    out = blocked.attention_blocked(q, k, v, scale=0.3, window=options["window"], mask=mask)
    expected = attention_reference(q, k, v, scale=0.3, **options)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cross_entropy_over_shards_is_torchs_over_the_whole(ranks):
    vocab, width = 21, {1: 24, 2: 12, 4: 8}[ranks]  # with 4 ranks the last holds only padding
    logits = (5 * torch.randn(9, ranks * width)).double()
    targets = torch.randint(0, vocab, (9,))
    targets[::4] = -100
    wide = logits[:, :vocab].clone().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    shards = [logits[:, r * width : (r + 1) * width].clone() for r in range(ranks)]
    places = [{"vocab_start": r * width, "valid": min(max(vocab - r * width, 0), width)} for r in range(ranks)]
    stats = merge_stats(torch.stack([cross_entropy_stats(s, targets, **p) for s, p in zip(shards, places)]))
    loss = cross_entropy_loss(stats, targets, vocab_size=vocab)
    torch.testing.assert_close(loss, expected)
    grad_N = torch.rand(9, dtype=torch.float64) * (targets != -100)
    for shard, place in zip(shards, places):
        cross_entropy_grad_(shard, targets, stats, grad_N, **place)
    (want,) = torch.autograd.grad(expected, wide, grad_N)
    got = torch.cat(shards, 1)
    torch.testing.assert_close(got[:, :vocab], want)
    assert (got[:, vocab:] == 0).all()


def test_z_loss_gradient_and_targets_out_of_range():
    logits, targets = torch.randn(5, 11, dtype=torch.float64), torch.tensor([0, 10, -100, 3, 4])
    wide, grad_N, options = logits.clone().requires_grad_(), torch.rand(5).double() * (targets != -100), {"z_loss": 0.3}
    stats = cross_entropy_stats(logits, targets)
    loss = cross_entropy_loss(stats, targets, vocab_size=11, **options)
    expected = F.cross_entropy(wide, targets, reduction="none") + 0.3 * wide.logsumexp(1).square() * (targets != -100)
    torch.testing.assert_close(loss, expected)
    (want,) = torch.autograd.grad(expected, wide, grad_N)
    torch.testing.assert_close(cross_entropy_grad_(logits.clone(), targets, stats, grad_N, **options), want)
    assert torch.equal(cross_entropy_stats_grad_(logits, targets, grad_N, **options), stats)
    torch.testing.assert_close(logits, want)
    wrong = cross_entropy_loss(stats, torch.tensor([0, 11, -1, -100, 4]), vocab_size=11)
    assert wrong.isnan().tolist() == [False, True, True, False, False]


def test_an_output_layers_chunks_are_whole_tiles_on_a_gpu():
    """Llama 3 8B's vocabulary: 2048 tokens, where 2^28 logits would be 2093; a CPU's products have no tiles."""
    assert chunk_rows(128256, torch.device("cuda")) == 2048
    assert chunk_rows(128256 * 16, torch.device("cuda")) == 130
    assert chunk_rows(8000, CPU) == 524 and chunk_rows(1 << 30, CPU) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_is_summed_in_fp32(monkeypatch, dtype):
    monkeypatch.setattr(cross_entropy_file, "PRODUCT_BYTES", 7 * 16 * 2)  # 7 rows of the product at a time
    grad, hidden, total = torch.randn(13, 40).to(dtype), torch.randn(13, 16).to(dtype), torch.ones(40, 16)
    for _ in range(2):
        add_product_(total, grad, hidden)
    expected = 1 + 2 * grad.double().t() @ hidden.double()
    assert (total - expected).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * (expected - 1).norm()


def test_adamw_is_torchs_and_shards_bitwise():
    size = 70_001
    weight = torch.randn(size)
    theirs = torch.nn.Parameter(weight.clone())
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.95), **options)
    whole = [weight.clone(), torch.zeros(size), torch.zeros(size)]
    cut = [x.clone() for x in whole]
    param = torch.empty(size, dtype=torch.bfloat16)
    for step in (1, 2, 3):
        grad = torch.randn(size)
        theirs.grad = 0.5 * grad
        optimizer.step()
        common = {"beta1": 0.9, "beta2": 0.95, "step": step, "grad_scale": 0.5, **options}
        adamw_(whole[0], grad, whole[1], whole[2], param_out=param, **common)
        for part in (slice(0, 33_333), slice(33_333, size)):
            w, m, v = (x[part] for x in cut)
            adamw_(w, grad[part], m, v, **common)
    torch.testing.assert_close(whole[0], theirs.detach())
    assert all(torch.equal(a, b) for a, b in zip(whole, cut))
    assert torch.equal(param, whole[0].bfloat16())
    assert square_sum(weight).item() == pytest.approx(weight.double().square().sum().item(), rel=1e-12)


def test_selection_on_a_cpu():
    kernels = select_kernels({"rope": "reference"}, CPU)
    assert kernels.choices["rope"] == "reference" and kernels.taken("attention") == "cpu"
    assert [line.split(":")[0] for line in kernels.describe().splitlines()] == [
        f"kernels.{name}" for name in OPERATIONS
    ]
    assert select_kernels({"default": "reference"}, CPU).attention is attention_reference


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"swiglu": "triton"}, ["kernels.swiglu = 'triton'", "device cpu", "reference"]),
        ({"default": "triton"}, ["kernels.default", "device cpu"]),
    ],
)
def test_mistakes_in_the_selection_are_one_line(choices, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError) as caught:
        select_kernels(choices, CPU)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_configuration_names_every_operation():
    assert {entry.name for entry in dataclasses.fields(KernelsConfig)} == {"default", *OPERATIONS}


def test_what_a_launch_cannot_take_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for number, words in ((0, None), (1, "a tensor on cuda:1")):
        tensor = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", number), dtype=torch.bfloat16)
        told = obstacle(tensor)
        assert told is None if words is None else words in told
    assert obstacle(torch.zeros(1)) is None and "float64" in obstacle(torch.zeros(1).double())


def test_importing_the_package_does_not_import_triton():
    script = "import sys, megalite.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_the_mask_of_documents_is_made_once_for_all_layers(monkeypatch):
    monkeypatch.setattr(native, "obstacle", lambda: "for this test")
    made = []
    plain = reference.visible_keys
    monkeypatch.setattr(reference, "visible_keys", lambda *a, **o: made.append(o["window"]) or plain(*a, **o))
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]]).t()
    q, kv = torch.randn(6, 2, 4, 8), torch.randn(6, 2, 2, 8)
    positions = Positions(torch.ones(6, 8), torch.zeros(6, 8), numbers)
    for window in (None, None, 2, None):
        shared = attention_cpu(q, kv, kv, documents=positions.documents, window=window)
        assert torch.equal(shared, attention_cpu(q, kv, kv, documents=numbers, window=window))
    assert made == [None, None, None, 2, 2, None]  # each first call of the shared one, and every call of the other
    assert Positions(torch.ones(6, 8), torch.zeros(6, 8)).documents is None


def forms_of(operation):
    """The modules of the plain and the Triton form."""
    names = (operation, "attention.flash_triton" if operation == "attention" else f"{operation}_triton")
    return [importlib.import_module(f"megalite.kernels.{name}") for name in names]


def test_both_forms_have_one_signature():
    pytest.importorskip("triton")
    for operation, names in OPERATIONS.items():
        plain, triton_form = forms_of(operation)
        for name in set(names) - set(PLAIN_ALONE):
            mine, theirs = inspect.signature(getattr(triton_form, name)), inspect.signature(getattr(plain, name))
            for a, b in zip(mine.parameters.values(), theirs.parameters.values(), strict=True):
                assert (a.name, a.kind, a.default) == (b.name, b.kind, b.default), name


HEADS = torch.randn(4, 2, 6, 8)
FLAT = torch.zeros(5)


@pytest.mark.parametrize(
    ("operation", "name", "arguments", "options", "words"),
    [
        ("attention", "attention", (HEADS, HEADS[:, :1], HEADS[:, :1]), {}, "(4, 2, 6, 8), k (4, 1, 6, 8)"),
        ("attention", "attention", (HEADS, HEADS[:, :, :4], HEADS[:, :, :4]), {}, "a multiple of kv heads"),
        ("attention", "attention", (HEADS, HEADS[..., :6], HEADS[..., :6]), {}, "head dim"),
        ("attention", "attention", (HEADS, HEADS, HEADS[:3]), {}, "v (3, 2, 6, 8)"),
        ("attention", "attention", (HEADS, HEADS.half(), HEADS.half()), {}, "one dtype"),
        ("attention", "attention", (HEADS, HEADS, HEADS), {"documents": torch.zeros(2, 4)}, "documents"),
        ("rms_norm", "rms_norm", (HEADS, torch.ones(6), 1e-5), {}, "weight must be [hidden], not (6,)"),
        ("rms_norm", "add_rms_norm", (HEADS, HEADS[:1], torch.ones(8), 1e-5), {}, "residual"),
        ("rope", "rope", (HEADS, HEADS[:3], torch.ones(4, 8), torch.ones(4, 8)), {}, "k must be"),
        ("rope", "rope", (HEADS, HEADS, torch.ones(4, 8), torch.ones(5, 8)), {}, "cos and sin"),
        ("rope", "rope", (HEADS, HEADS, torch.ones(4, 10), torch.ones(4, 10)), {}, "at most 8, not 10"),
        ("rope", "rope_qkv", (torch.ones(4, 2, 31), HEADS, HEADS, 2, 1, 8), {}, "2 + 2 * 1 heads of 8, not (4, 2, 31)"),
        ("swiglu", "swiglu", (torch.ones(2, 7),), {}, "[..., 2 F], not (2, 7)"),
        ("cross_entropy", "cross_entropy_stats", (torch.ones(3, 4), torch.ones(2).long()), {}, "(3, 4), (2,)"),
        ("cross_entropy", "cross_entropy_stats", (torch.ones(4, 3).t(), torch.ones(3).long()), {}, "strides (1, 3)"),
        ("cross_entropy", "cross_entropy_stats", (torch.ones(3, 4), torch.ones(3).long()), {"valid": 5}, "not 5"),
        ("fp8", "fp8_cast", (torch.ones(3), torch.float8_e5m2), {"per_row": True}, "two dimensions, not (3,)"),
        ("fp8", "fp8_cast_transpose", (torch.ones(2, 3), torch.half), {"per_row": False}, "e5m2, not torch.float16"),
        ("adamw", "square_sum", (torch.ones(2, 3),), {}, "1-D"),
        ("adamw", "adamw_", (FLAT, FLAT, FLAT[:4], FLAT), ADAMW, "exp_avg must be contiguous and 1-D with 5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [0, 1])
def test_arguments_that_do_not_fit_are_refused_in_both_forms(form, operation, name, arguments, options, words):
    """Before any kernel is launched: one that read beyond its tensors would not say so."""
    pytest.importorskip("triton")
    module = forms_of(operation)[form]
    with pytest.raises(ValueError) as caught:
        getattr(module, name)(*arguments, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
