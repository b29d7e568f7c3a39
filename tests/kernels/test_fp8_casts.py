"""The specification of casts to 8-bit floats, against numbers chosen from the dtype's whole table in float64."""

import pytest
import torch

from megalite.kernels.fp8 import DTYPES, TINY, fp8_cast, fp8_cast_transpose

pytestmark = pytest.mark.fast

PER_ROW = pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])


def nearest(x, dtype):
    """x in float64 as the nearest finite numbers of `dtype`; of two as near, the one with the even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(dtype).double()
    finite = table.isfinite()
    codes, table = codes[finite], table[finite]
    distance = (x.flatten()[:, None] - table).abs()
    distance = torch.where(distance == distance.amin(1, keepdim=True), (codes % 2).double(), torch.inf)
    return table[distance.argmin(1)].view(x.shape)


def expected(x, dtype, per_row):
    """The formula; quotients are those of fp32 numbers rounded to fp32, which float64 gives exactly."""
    wide = x.double()
    largest = wide.abs().amax(1, keepdim=True) if per_row else wide.abs().amax()
    tiny = torch.tensor(TINY).double()  # as fp32 holds it
    scale = (torch.maximum(largest, tiny) / torch.finfo(dtype).max).float()
    return nearest((wide / scale.double()).float().double(), dtype), scale


@PER_ROW
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (33, 16), (16, 48)])
def test_numbers_of_all_sizes(shape, dtype, per_row):
    x = (torch.randn(shape) * 10 ** (3 * torch.randn(shape))).bfloat16()
    x[0, -1] = 0
    x[-1] = 0
    for ours, wide in ((fp8_cast(x, dtype, per_row=per_row), x), (_turned(x, dtype, per_row), x.t())):
        codes, scale = ours
        values, wanted = expected(wide, dtype, per_row)
        assert codes.dtype == dtype and codes.is_contiguous() and scale.dtype == torch.float32
        assert torch.equal(codes.double(), values) and torch.equal(scale, wanted)


def _turned(x, dtype, per_row):
    return fp8_cast_transpose(x, dtype, per_row=per_row)[2:]


@PER_ROW
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_its_scale_is(dtype, per_row):
    x = torch.randn(4, 16).bfloat16()
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    codes, scale = fp8_cast(x, dtype, per_row=per_row)
    values = codes.float()
    if not per_row:
        assert scale.isnan() and values.isnan().all()
        return
    assert scale[1] == torch.inf and scale[2].isnan() and values[2].isnan().all()
    assert values[1, 3].isnan() and not values[1, torch.arange(16) != 3].any()
    kept = [0, 3]
    assert torch.equal(values[kept], fp8_cast(x[kept], dtype, per_row=True)[0].float())


@PER_ROW
@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
def test_matrices_without_elements(shape, per_row):
    parts = fp8_cast_transpose(torch.empty(shape), torch.float8_e4m3fn, per_row=per_row)
    assert parts[0].shape == shape and parts[2].shape == shape[::-1]
    assert all(scale.isfinite().all() for scale in parts[1::2])
    assert parts[1].shape == ((shape[0], 1) if per_row else ())
