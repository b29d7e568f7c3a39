"""Casts to 8-bit floats with a scale in Triton. Specification: `fp8.py`.

Bound by memory. Bytes an element of b bytes: one scale 2 b + 1 (the largest magnitude must be known before the first
number is cast), a scale for each row b + 1 (a row of up to 16384 numbers stays in registers; a longer one is read
again from the cache), matrix and transpose 2 b + 2, with scales for rows of both as well.

Magnitudes are compared as the bits of fp32 numbers without their sign: integers of the same order, in which NaN is the
largest, so that it is not lost in a maximum. Divisions are rounded correctly: the codes have the specification's bits.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import TINY, check, scale_of
from .layout import next_power_of_two, obstacle, program_count, warps_for

BLOCK = 4096  # elements of a program's turn, whole matrices
WARPS = 8
ROW = 16384  # columns that a program holds in registers
TILE = 64  # rows and columns of a tile that is written twice
TILE_WARPS = 4
_TINY = tl.constexpr(TINY)


@triton.jit
def magnitude(x):
    """The bits of |x| in fp32, int32."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_from(largest, LIMIT: tl.constexpr):
    """The scale, fp32, of the largest `magnitude`."""
    size = largest.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(size < _TINY, _TINY, size), tl.full([], LIMIT, tl.float32))


@triton.jit
def code(x, scale, LIMIT: tl.constexpr, dtype: tl.constexpr):
    y = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale, x.shape))
    return tl.where(y != y, y, tl.minimum(tl.maximum(y, -LIMIT), LIMIT)).to(dtype)


@triton.jit
def largest_kernel(x_ptr, largest_ptr, count, BLOCK: tl.constexpr):
    """The largest magnitude of each program's share."""
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    for _ in range(tl.cdiv(count - first, tl.num_programs(0) * BLOCK)):
        largest = tl.maximum(largest, magnitude(tl.load(x_ptr + at, mask=at < count, other=0.0)))
        at += tl.num_programs(0) * BLOCK
    tl.store(largest_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def cast_kernel(
    x_ptr, codes_ptr, largest_ptr, scale_ptr, count, shares, LIMIT: tl.constexpr, SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Casts with one scale, of the largest of the `shares`; the first program writes it."""
    share = tl.arange(0, SHARES)
    scale = scale_from(tl.max(tl.load(largest_ptr + share, mask=share < shares, other=0), axis=0), LIMIT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    tl.store(codes_ptr + at, code(x, scale, LIMIT, codes_ptr.dtype.element_ty), mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


@triton.jit
def cast_rows_kernel(x_ptr, codes_ptr, scale_ptr, width, LIMIT: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """Casts one row with its own scale; with `HELD` it fits into a block, and is read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if HELD:
        x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0)
        scale = scale_from(tl.max(magnitude(x), axis=0), LIMIT)
        value = code(x, scale, LIMIT, codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * width + column, value, mask=column < width)
    else:
        largest = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, width, BLOCK):
            at = start + column
            largest = tl.maximum(largest, magnitude(tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)))
        scale = scale_from(tl.max(largest, axis=0), LIMIT)
        for start in range(0, width, BLOCK):
            at = start + column
            x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)
            value = code(x, scale, LIMIT, codes_ptr.dtype.element_ty)
            tl.store(codes_ptr + row * width + at, value, mask=at < width)
    tl.store(scale_ptr + row, scale)


@triton.jit
def largest_of_tiles_kernel(x_ptr, by_row_ptr, by_column_ptr, outputs, inputs, TILE: tl.constexpr):
    """The largest magnitudes of a tile's rows and of its columns: [tiles across, outputs], [tiles down, inputs]."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (row < outputs)[:, None] & (column < inputs)[None, :]
    sizes = magnitude(tl.load(x_ptr + row[:, None] * inputs + column[None, :], mask=mask, other=0.0))
    tl.store(by_row_ptr + tl.program_id(1).to(tl.int64) * outputs + row, tl.max(sizes, axis=1), mask=row < outputs)
    by_column = by_column_ptr + tl.program_id(0).to(tl.int64) * inputs + column
    tl.store(by_column, tl.max(sizes, axis=0), mask=column < inputs)


@triton.jit
def cast_tiles_kernel(
    x_ptr, codes_ptr, turned_ptr, row_scale_ptr, column_scale_ptr, outputs, inputs, LIMIT: tl.constexpr,
    PER_ROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Casts a tile and writes it twice: in place, and transposed, there with the scales of columns if `PER_ROW`."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (row < outputs)[:, None] & (column < inputs)[None, :]
    x = tl.load(x_ptr + row[:, None] * inputs + column[None, :], mask=mask, other=0.0)
    if PER_ROW:
        scale = tl.load(row_scale_ptr + row, mask=row < outputs, other=1.0)[:, None]
        turned_scale = tl.load(column_scale_ptr + column, mask=column < inputs, other=1.0)[None, :]
        value = code(x, scale, LIMIT, codes_ptr.dtype.element_ty)
        turned = code(x, turned_scale, LIMIT, codes_ptr.dtype.element_ty)
    else:
        value = code(x, tl.load(row_scale_ptr), LIMIT, codes_ptr.dtype.element_ty)
        turned = value
    tl.store(codes_ptr + row[:, None] * inputs + column[None, :], value, mask=mask)
    tl.store(turned_ptr + column[:, None] * outputs + row[None, :], tl.trans(turned), mask=tl.trans(mask))


def _limit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


@torch.library.custom_op("megalite::fp8_largest", mutates_args=())
def _largest(x_NK: Tensor) -> Tensor:
    """int32 [programs]: the largest magnitude of each program's share of a contiguous matrix."""
    shares = _largest_fake(x_NK)
    largest_kernel[(len(shares),)](x_NK, shares, x_NK.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return shares


@_largest.register_fake
def _largest_fake(x_NK: Tensor) -> Tensor:
    programs = max(1, min(2 * program_count(x_NK.device), triton.cdiv(x_NK.numel(), BLOCK)))
    return x_NK.new_empty(programs, dtype=torch.int32)


@torch.library.custom_op("megalite::fp8_cast_tensor", mutates_args=())
def _cast_tensor(x_NK: Tensor, shares: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes_NK, scale = _cast_tensor_fake(x_NK, shares, dtype)
    cast_kernel[(max(1, triton.cdiv(x_NK.numel(), BLOCK)),)](
        x_NK, codes_NK, shares, scale, x_NK.numel(), len(shares), LIMIT=_limit(dtype),
        SHARES=next_power_of_two(len(shares)), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return codes_NK, scale


@_cast_tensor.register_fake
def _cast_tensor_fake(x_NK: Tensor, shares: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x_NK.new_empty(x_NK.shape, dtype=dtype), x_NK.new_empty((), dtype=torch.float32)


@torch.library.custom_op("megalite::fp8_cast_rows", mutates_args=())
def _cast_rows(x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes_NK, scale_N1 = _cast_rows_fake(x_NK, dtype)
    rows, width = x_NK.shape
    if rows:
        held = width <= ROW
        block = next_power_of_two(width) if held else BLOCK
        cast_rows_kernel[(rows,)](
            x_NK, codes_NK, scale_N1, width, LIMIT=_limit(dtype), HELD=held, BLOCK=block, num_warps=warps_for(block)
        )
    return codes_NK, scale_N1


@_cast_rows.register_fake
def _cast_rows_fake(x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x_NK.new_empty(x_NK.shape, dtype=dtype), x_NK.new_empty((x_NK.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("megalite::fp8_largest_of_tiles", mutates_args=())
def _largest_of_tiles(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [tiles across, N], [tiles down, K]."""
    by_row, by_column = _largest_of_tiles_fake(x_NK)
    grid = (len(by_column), len(by_row))
    largest_of_tiles_kernel[grid](x_NK, by_row, by_column, *x_NK.shape, TILE=TILE, num_warps=TILE_WARPS)
    return by_row, by_column


@_largest_of_tiles.register_fake
def _largest_of_tiles_fake(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x_NK.shape
    shapes = ((triton.cdiv(columns, TILE), rows), (triton.cdiv(rows, TILE), columns))
    by_row, by_column = (x_NK.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return by_row, by_column


@torch.library.custom_op("megalite::fp8_cast_tiles", mutates_args=())
def _cast_tiles(
    x_NK: Tensor, row_scale: Tensor, column_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes of x and of its transpose; without `column_scale`, `row_scale` is the one number for both."""
    codes_NK, codes_KN = _cast_tiles_fake(x_NK, row_scale, column_scale, dtype)
    rows, columns = x_NK.shape
    per_row = column_scale is not None
    cast_tiles_kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        x_NK, codes_NK, codes_KN, row_scale, column_scale if per_row else row_scale, rows, columns,
        LIMIT=_limit(dtype), PER_ROW=per_row, TILE=TILE, num_warps=TILE_WARPS,
    )  # fmt: skip
    return codes_NK, codes_KN


@_cast_tiles.register_fake
def _cast_tiles_fake(
    x_NK: Tensor, row_scale: Tensor, column_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x_NK.new_empty(x_NK.shape, dtype=dtype), x_NK.new_empty(x_NK.shape[::-1], dtype=dtype)


def unsupported(x_NK: Tensor, *rest: object, **options: object) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    if not x_NK.numel():
        return "a matrix without elements"
    if x_NK.dim() == 2 and triton.cdiv(x_NK.shape[1], TILE) >= 2**16:
        return f"{x_NK.shape[1]} columns"
    return obstacle(x_NK)


def fp8_cast(x_NK: Tensor, dtype: torch.dtype, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """As `fp8.fp8_cast`."""
    check(x_NK, dtype)
    x_NK = x_NK.contiguous()
    codes_NK, scale = _cast_rows(x_NK, dtype) if per_row else _cast_tensor(x_NK, _largest(x_NK), dtype)
    return codes_NK, scale


def fp8_cast_transpose(x_NK: Tensor, dtype: torch.dtype, *, per_row: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fp8.fp8_cast_transpose`, in two reads of x whatever the scales are of."""
    check(x_NK, dtype)
    x_NK = x_NK.contiguous()
    if not per_row:
        scale = scale_of(_largest(x_NK).amax().view(torch.float32), dtype)
        codes_NK, codes_KN = _cast_tiles(x_NK, scale, None, dtype)
        return codes_NK, scale, codes_KN, scale
    by_row, by_column = (part.amax(0).view(torch.float32).unsqueeze(1) for part in _largest_of_tiles(x_NK))
    row_scale_N1, column_scale_K1 = scale_of(by_row, dtype), scale_of(by_column, dtype)
    codes_NK, codes_KN = _cast_tiles(x_NK, row_scale_N1, column_scale_K1, dtype)
    return codes_NK, row_scale_N1, codes_KN, column_scale_K1
