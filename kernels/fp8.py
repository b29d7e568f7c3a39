"""Casts to 8-bit floats with a scale (Micikevicius et al. 2022, arXiv:2209.05433): the specification in plain PyTorch.

    scale = max |x| / largest number of the dtype        codes = x / scale, rounded to nearest even

with the largest magnitude of the whole matrix, or of each row. A matrix of zeros has a scale of 1e-12 / largest number.
An infinity makes its scale infinite, so that finite numbers become 0 and the infinity NaN; a NaN makes everything NaN
that shares its scale. The Triton form with the same signatures is in `fp8_triton.py`.

Shapes: N rows, K columns.
"""

import torch
from torch import Tensor

TINY = 1e-12
"""The least magnitude that a scale is made of: zeros are divided by something."""

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def check(x_NK: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError for another number of dimensions or another dtype than the two; both forms call it first."""
    if x_NK.dim() != 2:
        raise ValueError(f"the matrix must have two dimensions, not {tuple(x_NK.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"the dtype must be float8_e4m3fn or float8_e5m2, not {dtype}")


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32: what the numbers are divided by whose largest magnitude is given."""
    return largest.float().clamp(min=TINY) / torch.finfo(dtype).max


def fp8_cast(x_NK: Tensor, dtype: torch.dtype, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """(codes [N, K] of `dtype`, row-major; scale, fp32: a number, or [N, 1] with `per_row`)."""
    check(x_NK, dtype)
    if not x_NK.numel():
        largest = x_NK.new_zeros((x_NK.shape[0], 1) if per_row else ())
    else:
        largest = x_NK.abs().amax(dim=1, keepdim=True) if per_row else x_NK.abs().amax()
    scale, limit = scale_of(largest, dtype), torch.finfo(dtype).max
    return (x_NK.float() / scale).clamp(-limit, limit).to(dtype).contiguous(), scale


def fp8_cast_transpose(x_NK: Tensor, dtype: torch.dtype, *, per_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scale of x, as `fp8_cast` gives them, and codes [K, N], row-major, and scale of its transpose."""
    codes_NK, scale = fp8_cast(x_NK, dtype, per_row=per_row)
    if not per_row:
        return codes_NK, scale, codes_NK.t().contiguous(), scale
    return codes_NK, scale, *fp8_cast(x_NK.t(), dtype, per_row=True)
