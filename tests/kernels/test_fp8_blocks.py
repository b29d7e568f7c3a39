"""The specification of scales of blocks, against casts of each block alone and products of the numbers meant."""

import pytest
import torch

from megalite.kernels.fp8 import DTYPES, fp8_cast
from megalite.kernels.fp8_blocks import BLOCK, fp8_block_product, fp8_cast_blocks, fp8_cast_weight_blocks

pytestmark = pytest.mark.fast

SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 70), (200, 300), (128, 256)])


def spread(shape):
    return (torch.randn(shape) * 10 ** torch.randn(shape)).bfloat16()


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
def test_each_block_is_cast_as_if_alone(shape, dtype):
    x = spread(shape)
    codes, scale_kN = fp8_cast_blocks(x, dtype)
    weight_codes, scale_oi, turned = fp8_cast_weight_blocks(x, dtype)
    assert torch.equal(turned.float(), weight_codes.float().t()) and turned.is_contiguous()
    for k, across in enumerate(x.split(BLOCK, 1)):
        here = slice(k * BLOCK, (k + 1) * BLOCK)
        alone, scale = fp8_cast(across, dtype, per_row=True)
        assert torch.equal(codes[:, here].float(), alone.float()) and torch.equal(scale_kN[k], scale[:, 0])
        for o, block in enumerate(across.split(BLOCK, 0)):
            alone, scale = fp8_cast(block, dtype, per_row=False)
            there = weight_codes[o * BLOCK : (o + 1) * BLOCK, here]
            assert torch.equal(there.float(), alone.float()) and scale_oi[o, k] == scale


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1, 1), (5, 130, 40), (140, 300, 260)])
def test_a_product_is_that_of_the_numbers_meant(rows, inner, outer):
    codes, scale_kN = fp8_cast_blocks(spread((rows, inner)), torch.float8_e5m2)
    of_weight, scale_oi, _ = fp8_cast_weight_blocks(spread((outer, inner)), torch.float8_e4m3fn)
    a = codes.double() * scale_kN.t().double().repeat_interleave(BLOCK, 1)[:, :inner]
    scales = scale_oi.double().repeat_interleave(BLOCK, 0)[:outer].repeat_interleave(BLOCK, 1)[:, :inner]
    exact = a @ (of_weight.double() * scales).t()
    ours = fp8_block_product(codes, scale_kN, of_weight, scale_oi)
    assert ours.dtype == torch.bfloat16
    assert ((ours.double() - exact).norm() / exact.norm()).item() < 2**-8


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
def test_matrices_without_elements(shape):
    codes, scales = fp8_cast_blocks(torch.empty(shape), torch.float8_e4m3fn)
    assert codes.shape == shape and scales.shape == (-(-shape[1] // BLOCK), shape[0])
    product = fp8_block_product(
        codes, scales, *fp8_cast_weight_blocks(torch.ones(5, shape[1]), torch.float8_e4m3fn)[:2]
    )
    assert product.shape == (shape[0], 5) and not product.any()


def test_a_large_number_costs_its_block_alone():
    x = torch.randn(4, 256).bfloat16()
    x[0, 7] = 1e8
    codes, scales = fp8_cast_blocks(x, torch.float8_e4m3fn)
    by_row = fp8_cast(x, torch.float8_e4m3fn, per_row=True)[0]
    assert not by_row[0, 128:].float().any() and codes[0, 128:].float().abs().max() == 448
    assert scales[0, 0] > 1000 * scales[1, 0]
