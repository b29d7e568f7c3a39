"""RMSNorm, rotary embedding and SwiGLU in Triton against their float64 references."""

import functools

import pytest
import torch

from megalite.kernels import rms_norm, rms_norm_triton, rope, rope_triton, swiglu, swiglu_triton
from megalite.kernels.layout import as_rows
from tests.kernels.suite.kernel_checks import compare

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 96), (1, 1), (37, 257), (2, 3, 7, 64), (3, 4100), (5, 9000)])
def test_rms_norm(device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    compare(
        lambda x, w: rms_norm_triton.rms_norm(x, w, EPS), lambda x, w: rms_norm.rms_norm(x, w, EPS), (x, weight), dtype
    )


def test_rms_norm_casts_before_the_weight(device):
    """Every bit as the reference in bf16: the other order of the casts differs in about one element of four."""
    x, weight = torch.randn(40, 512, device=device).bfloat16(), torch.randn(512, device=device).bfloat16()
    ours, reference = rms_norm_triton.rms_norm(x, weight, EPS), rms_norm.rms_norm(x, weight, EPS)
    assert (ours != reference).float().mean() < 0.005  # fp32 sums in another order may round a value the other way


def test_rms_norm_reads_heads_of_a_fused_projection_in_place(device):
    qkv = torch.randn(6, 2, 5 * 32, device=device)
    q = qkv[..., : 3 * 32].unflatten(-1, (3, 32))
    assert as_rows(q).tensor.data_ptr() == qkv.data_ptr()
    weight = torch.randn(32, device=device)
    compare(
        lambda x, w: rms_norm_triton.rms_norm(x, w, EPS),
        lambda x, w: rms_norm.rms_norm(x, w, EPS),
        (q, weight),
        q.dtype,
    )


@pytest.mark.parametrize("make", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)])
def test_rms_norm_strides(device, make):
    x, weight = make(torch.randn(4, 6, 70, device=device)), torch.randn(70, device=device)
    compare(
        lambda x, w: rms_norm_triton.rms_norm(x, w, EPS),
        lambda x, w: rms_norm.rms_norm(x, w, EPS),
        (x, weight),
        x.dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 2, 96), (130, 33), (4, 8500)])
def test_add_rms_norm(device, dtype, shape):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    compare(
        lambda x, r, w: rms_norm_triton.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
        (x, residual.transpose(0, -2).contiguous().transpose(0, -2), weight),
        dtype,
    )


def test_add_rms_norm_rounds_the_sum_first(device):
    """The fused sum is bitwise the unfused one, and its norm bitwise the norm of that sum."""
    x, residual = (torch.randn(9, 200, device=device).bfloat16() for _ in range(2))
    weight = torch.randn(200, device=device).bfloat16()
    total, y = rms_norm_triton.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm_triton.rms_norm(x + residual, weight, EPS))


def test_rms_norm_weight_gradient_repeats_bitwise(device):
    x, weight = torch.randn(300, 128, device=device), torch.randn(128, device=device, requires_grad=True)
    upstream = torch.randn_like(x)
    runs = 3 if device.type == "cpu" else 30
    grads = [torch.autograd.grad(rms_norm_triton.rms_norm(x, weight, EPS), weight, upstream)[0] for _ in range(runs)]
    assert all(torch.equal(grads[0], grad) for grad in grads[1:])


def rotary_table(positions, width, device):
    inverse = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angle = positions[..., None].double() * inverse
    angle = torch.cat([angle, angle], -1)
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "rotated"), [(4, 2, 64, 64), (3, 1, 40, 40), (5, 5, 80, 20)])
@pytest.mark.parametrize("per_document", [False, True])
def test_rope(device, dtype, heads, kv_heads, width, rotated, per_document):
    sequence, batch = 7, 3
    q = torch.randn(sequence, batch, heads, width, device=device).to(dtype)
    k = torch.randn(sequence, batch, kv_heads, width, device=device).to(dtype)
    shape = (sequence, batch) if per_document else (sequence,)
    tables = rotary_table(torch.randint(0, 5000, shape, device=device), rotated, device)
    compare(lambda q, k: rope_triton.rope(q, k, *tables), lambda q, k: rope.rope(q, k, *tables), (q, k), dtype)


def test_rope_reads_a_fused_projection_and_expanded_gradients(device):
    """q and k as views into QKV; the gradient arrives expanded (stride 0), as autograd's sum sends it."""
    qkv = torch.randn(5, 2, 8 * 64, device=device, dtype=torch.float32)
    tables = rotary_table(torch.arange(5, device=device), 64, device)

    def run(op, qkv):
        q, k = (part.unflatten(-1, (-1, 64)) for part in qkv.split([4 * 64, 2 * 64, 2 * 64], -1)[:2])
        q, k = op(q, k, *tables)
        return q.sum() + 3 * k.sum()

    compare(functools.partial(run, rope_triton.rope), functools.partial(run, rope.rope), (qkv,), qkv.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "rotated"), [(4, 2, 64, 64), (3, 1, 40, 40), (5, 5, 80, 20)])
@pytest.mark.parametrize(("per_document", "batch"), [(False, 1), (True, 2)])
def test_rope_of_a_fused_projection(device, dtype, heads, kv_heads, width, rotated, per_document, batch):
    """Its gradient is one tensor in which nothing is left out, and v does not keep the projection."""
    sequence, sizes = 5, (heads, kv_heads, width)
    qkv = torch.randn(sequence, batch, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    shape = (sequence, batch) if per_document else (sequence,)
    tables = rotary_table(torch.randint(0, 5000, shape, device=device), rotated, device)
    compare(
        lambda qkv: rope_triton.rope_qkv(qkv, *tables, *sizes),
        lambda qkv: rope.rope_qkv(qkv, *tables, *sizes),
        (qkv,),
        dtype,
    )
    q, k, v = rope_triton.rope_qkv(qkv.requires_grad_(), *tables, *sizes)
    assert v.is_contiguous() and v.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    mine = torch.autograd.grad((q.sum() + 3 * k.sum() + (v * v).sum()).float(), qkv)[0]
    q, k, v = rope.split_qkv(qkv, *sizes)
    q, k = rope_triton.rope(q, k, *tables)
    assert mine.is_contiguous()
    assert torch.equal(mine, torch.autograd.grad((q.sum() + 3 * k.sum() + (v * v).sum()).float(), qkv)[0])
    with torch.no_grad():
        assert all(map(torch.equal, rope_triton.rope_qkv(qkv, *tables, *sizes), (q, k, v)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 2 * 96), (1, 2), (3, 2 * 2500)])
def test_swiglu(device, dtype, shape):
    compare(swiglu_triton.swiglu, swiglu.swiglu, (3 * torch.randn(shape, device=device).to(dtype),), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 2 * 96), (1, 2), (3, 2 * 2500)])
def test_swiglu_again_is_the_forward_and_the_backward_kernel_in_one(device, dtype, shape):
    x = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    grad = torch.randn((*shape[:-1], shape[-1] // 2 + 3), device=device).to(dtype)[..., 3:]
    y = swiglu_triton.swiglu(x)
    again = swiglu_triton.swiglu_again(grad, x.detach())
    assert all(map(torch.equal, again, (y, torch.autograd.grad(y, x, grad)[0])))


def test_swiglu_strided_and_extreme(device):
    x = torch.randn(6, 4, 2 * 33, device=device).transpose(0, 1)
    x = x.clone(memory_format=torch.preserve_format)
    x[0, 0, :4] = torch.tensor([200.0, -200.0, 0.0, 1e30], device=device)
    compare(swiglu_triton.swiglu, swiglu.swiglu, (x,), x.dtype)


def test_empty_inputs(device):
    x = torch.randn(0, 64, device=device)
    assert swiglu_triton.swiglu(x).shape == (0, 32)
    assert rms_norm_triton.rms_norm(x, torch.ones(64, device=device), EPS).shape == (0, 64)
