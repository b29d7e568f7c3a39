"""Casts to 8-bit floats in Triton: the specification's bits, for any shape, stride and number."""

import pytest
import torch

from megalite.kernels import fp8, fp8_triton

DTYPES = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
PER_ROW = pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])


def same(ours, expected):
    """Bit for bit; NaN is NaN."""
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        a, b = a.float(), b.float().to(a.device)
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def both_forms_agree(x, dtype, per_row):
    on_host = x.cpu()
    for name in ("fp8_cast", "fp8_cast_transpose"):
        ours = getattr(fp8_triton, name)(x, dtype, per_row=per_row)
        same(ours, getattr(fp8, name)(on_host, dtype, per_row=per_row))


@DTYPES
@PER_ROW
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (130, 65), (64, 128), (7, 4100)])
def test_odd_shapes_in_both_orders(device, shape, dtype, per_row):
    for kind in (torch.bfloat16, torch.float32):
        x = (torch.randn(shape, device=device) * 10 ** torch.randn(shape[0], 1, device=device)).to(kind)
        both_forms_agree(x, dtype, per_row)


@DTYPES
@PER_ROW
def test_rows_longer_than_a_block_and_strides(device, dtype, per_row, monkeypatch):
    monkeypatch.setattr(fp8_triton, "ROW", 64)
    monkeypatch.setattr(fp8_triton, "BLOCK", 128)
    whole = torch.randn(11, 300, device=device).bfloat16()
    for x in (whole, whole[:, 5:270], whole.t(), whole[::3]):
        both_forms_agree(x, dtype, per_row)


@DTYPES
@PER_ROW
@pytest.mark.parametrize("special", [0.0, torch.inf, -torch.inf, torch.nan, 1e-30, 3e38])
def test_zeros_and_what_is_not_finite(device, special, dtype, per_row):
    x = torch.randn(9, 40, device=device).bfloat16()
    x[4] = 0
    x[6, 3], x[7] = special, special
    both_forms_agree(x, dtype, per_row)
    both_forms_agree(torch.full_like(x, special), dtype, per_row)


def test_every_number_of_a_half_rounds_to_nearest_even(device):
    numbers = torch.arange(2**16, dtype=torch.int32, device=device).short().view(torch.bfloat16)
    near_one = numbers[(numbers.abs() < 500) & (numbers.abs() > 1e-4)].view(1, -1)
    for dtype in fp8.DTYPES:
        both_forms_agree(near_one, dtype, True)
