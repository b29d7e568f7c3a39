"""The kernels as torch operators: fake tensors, schemas, torch.compile, and the selection by configuration."""

import logging

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megalite.kernels import (
    OPERATIONS,
    adamw_triton,
    cross_entropy_triton,
    rms_norm_triton,
    rope_triton,
    select_kernels,
    swiglu_triton,
)
from megalite.kernels.attention import flash_triton
from megalite.kernels.rms_norm import rms_norm


def test_fake_tensors_have_the_shapes_of_real_ones():
    """On fake tensors no kernel runs; shapes and dtypes come from the registered functions."""
    with FakeTensorMode():
        q, kv = torch.empty(10, 2, 4, 32, dtype=torch.bfloat16), torch.empty(10, 2, 2, 32, dtype=torch.bfloat16)
        out, lse = flash_triton.attention(q, kv, kv, return_lse=True)
        assert (out.shape, out.dtype) == (q.shape, q.dtype) and lse.shape == (2, 4, 10) and lse.dtype == torch.float32
        total, y = rms_norm_triton.add_rms_norm(q, q, torch.empty(32), 1e-5)
        assert total.dtype == torch.bfloat16 and y.dtype == torch.float32
        assert swiglu_triton.swiglu(torch.empty(3, 8)).shape == (3, 4)


def test_operators_pass_torchs_own_checks(device):
    x, weight = torch.randn(4, 32, device=device), torch.randn(32, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.megalite.rms_norm_forward.default, (x, x, weight, 1e-5), test_utils=checks)
    torch.library.opcheck(torch.ops.megalite.swiglu_forward.default, (x,), test_utils=checks)
    q = torch.randn(8, 1, 2, 16, device=device)
    args = (q, q, q, None, True, 0, 0.25, 0.0)
    torch.library.opcheck(torch.ops.megalite.flash_attention_forward.default, args, test_utils=checks)


def test_a_compiled_block_equals_the_eager_one(device):
    """fullgraph: no kernel breaks the graph, in either direction."""

    def block(x, weight):
        return swiglu_triton.swiglu(rms_norm_triton.rms_norm(x, weight, 1e-5)).square().sum()

    x, weight = (
        torch.randn(6, 32, device=device, requires_grad=True),
        torch.randn(32, device=device, requires_grad=True),
    )
    eager = torch.autograd.grad(block(x, weight), (x, weight))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), eager):
        torch.testing.assert_close(a, b)


def test_a_compiled_attention_layer_equals_the_eager_one(device):
    """Fused norm, rotation and attention by documents: no graph break, forward or backward."""
    documents = torch.tensor([0, 0, 1, 1, 1, 2], device=device)[:, None]
    cos, sin = torch.randn(6, 16, device=device), torch.randn(6, 16, device=device)

    def layer(x, residual, weight):
        total, y = rms_norm_triton.add_rms_norm(x, residual, weight, 1e-5)
        q, k, v = (part.unflatten(-1, (-1, 16)) for part in y.split([32, 16, 16], -1))
        q, k = rope_triton.rope(q, k, cos, sin)
        return flash_triton.attention(q, k, v, documents=documents).square().sum() + total.sum()

    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 1, 64), (6, 1, 64), (64,))]
    eager = torch.autograd.grad(layer(*leaves), leaves)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), eager):
        torch.testing.assert_close(a, b)


def test_a_compiled_loss_and_update_equal_the_eager_ones(device):
    """Operators that write into their arguments, under torch.compile."""
    logits, targets = torch.randn(5, 40, device=device), torch.randint(0, 40, (5,), device=device)

    def loss(z):
        stats = cross_entropy_triton.cross_entropy_stats_grad_(z, targets, torch.ones(5, device=device))
        return stats, adamw_triton.square_sum(z.flatten())

    def update(w, m, v):
        adamw_triton.adamw_(w, logits.flatten(), m, v, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1, step=1)
        return w

    for call, make in ((loss, lambda: [logits.clone()]), (update, lambda: list(torch.ones(3, 200, device=device)))):
        eager, compiled = make(), make()
        wanted = call(*eager)
        got = torch.compile(call, backend="aot_eager", fullgraph=True)(*compiled)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(compiled, eager)


def test_selection_takes_triton_here_and_says_so(device):
    kernels = select_kernels({"attention": "sdpa"}, device)
    assert kernels.choices["rms_norm"].startswith("triton") and kernels.choices["attention"] == "sdpa"
    assert len(kernels.describe().splitlines()) == len(OPERATIONS)


def test_an_unsupported_call_falls_back_and_says_why(device, caplog):
    x, weight = torch.randn(2, 20000, device=device), torch.randn(20000, device=device)
    with caplog.at_level("WARNING", logger="megalite.kernels"):
        kernels = select_kernels({"default": "triton"}, device)
        for _ in range(2):
            torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    (warned,) = (each.message for each in caplog.records if each.levelno >= logging.WARNING)
    assert "rms_norm" in warned and "20000" in warned


def test_attention_heads_too_wide_for_the_kernel(device):
    q = torch.randn(5, 1, 1, 320, device=device)
    ours, plain = (select_kernels({"default": name}, device).attention(q, q, q) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, plain)
