"""Casts to 8-bit floats with a scale for each block, in Triton: the specification's bits; and their products."""

import pytest
import torch

from megalite.kernels import fp8, fp8_blocks, fp8_blocks_triton
from tests.kernels.suite.test_fp8_kernels import same

DTYPES = pytest.mark.parametrize("dtype", fp8.DTYPES)
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 70), (130, 257), (33, 128), (257, 300)])


def spread(*shape, device):
    """Numbers of many sizes, some blocks much larger than others."""
    return torch.randn(shape, device=device) * 10 ** torch.randn(shape[0], 1, device=device)


def both_casts_agree(x, dtype):
    on_host = x.cpu()
    for name in ("fp8_cast_blocks", "fp8_cast_weight_blocks"):
        same(getattr(fp8_blocks_triton, name)(x, dtype), getattr(fp8_blocks, name)(on_host, dtype))


@DTYPES
@SHAPES
def test_odd_shapes_in_both_dtypes(device, shape, dtype):
    for kind in (torch.bfloat16, torch.float32):
        both_casts_agree(spread(*shape, device=device).to(kind), dtype)


@DTYPES
def test_strides(device, dtype):
    whole = spread(40, 300, device=device).bfloat16()
    for x in (whole[:, 5:270], whole.t(), whole[::3]):
        both_casts_agree(x, dtype)


@DTYPES
@pytest.mark.parametrize("special", [0.0, torch.inf, -torch.inf, torch.nan, 1e-30, 3e38])
def test_zeros_and_what_is_not_finite(device, special, dtype):
    x = torch.randn(9, 140, device=device).bfloat16()
    x[4] = 0
    x[6, 3], x[7, 130] = special, special
    both_casts_agree(x, dtype)
    both_casts_agree(torch.full_like(x, special), dtype)


@DTYPES
@pytest.mark.parametrize("turned", [False, True], ids=["weight", "its transpose"])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 16, 16), (5, 130, 40), (140, 300, 260)])
def test_products(device, rows, inner, outer, turned, dtype):
    """Sums of blocks with their scales, in fp32; the two differ by the order within a block."""
    a = spread(rows, inner, device=device).bfloat16()
    weight = spread(*((inner, outer) if turned else (outer, inner)), device=device).bfloat16()
    codes, scales = fp8_blocks.fp8_cast_blocks(a, dtype)
    of_weight, weight_scales, of_turned = fp8_blocks.fp8_cast_weight_blocks(weight, torch.float8_e4m3fn)
    factors = (of_turned, weight_scales.t()) if turned else (of_weight, weight_scales)
    ours = fp8_blocks_triton.fp8_block_product(codes, scales, *factors).cpu()
    plain = fp8_blocks.fp8_block_product(codes.cpu(), scales.cpu(), *(factor.cpu() for factor in factors))
    assert ours.shape == (rows, outer) and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=2**-6, atol=1e-2 * plain.abs().max().item() * 2**-6)
