"""Casts to 8-bit floats with a scale for each block, and their products, in Triton. Specification: `fp8_blocks.py`.

A block is cast from registers, so its numbers are read once. Bytes an element of b bytes: b + 1, and 4 for each 128; a
weight with its transpose b + 2, where scales of whole tensors or rows take 2 b + 2.

A product takes 128 numbers of both factors at a time, sums these in the tensor cores, which on Hopper keep some 14
bits between them, and adds the result in fp32 with the block's scales, as DeepSeek-V3 does (arXiv:2412.19437,
section 3.3.2).
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import check
from .fp8_blocks import BLOCK, block_count
from .fp8_triton import code, magnitude, scale_from
from .layout import obstacle

ROWS = 32  # rows of a program, casts
WARPS = 4
WEIGHT_WARPS = 8
PRODUCT = (128, 8, 8, 3)  # rows of a tile, tiles down that run side by side, warps, stages


@triton.jit
def cast_blocks_kernel(
    x_ptr, codes_ptr, scale_ptr, rows, width, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    scale = scale_from(tl.max(magnitude(x), axis=1), LIMIT)
    tl.store(codes_ptr + at, code(x, scale[:, None], LIMIT, codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + tl.program_id(1).to(tl.int64) * rows + row, scale, mask=row < rows)


@triton.jit
def cast_weight_blocks_kernel(
    x_ptr, codes_ptr, turned_ptr, scale_ptr, outputs, inputs, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < outputs)[:, None] & (column < inputs)[None, :]
    at = row[:, None] * inputs + column[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    scale = scale_from(tl.max(tl.max(magnitude(x), axis=1), axis=0), LIMIT)
    codes = code(x, scale, LIMIT, codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + at, codes, mask=mask)
    tl.store(turned_ptr + column[:, None] * outputs + row[None, :], tl.trans(codes), mask=tl.trans(mask))
    tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def block_product_kernel(
    a_ptr, b_ptr, out_ptr, a_scale_ptr, b_scale_ptr, rows, columns, width, down_stride, across_stride,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of a b^T; neighbouring programs share rows of b, `GROUP` tiles down."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    tile_n = within // height
    row = (group * GROUP + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_M, BLOCK], dtype=tl.float32)
    for block in range(tl.cdiv(width, BLOCK)):
        inner = block * BLOCK + tl.arange(0, BLOCK)
        a_mask = (row < rows)[:, None] & (inner < width)[None, :]
        b_mask = (column < columns)[:, None] & (inner < width)[None, :]
        a = tl.load(a_ptr + row[:, None] * width + inner[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + column[:, None] * width + inner[None, :], mask=b_mask, other=0.0)
        a_scale = tl.load(a_scale_ptr + row, mask=row < rows, other=0.0)
        b_scale = tl.load(b_scale_ptr + tile_n * down_stride + block * across_stride)
        total += tl.dot(a, tl.trans(b)) * a_scale[:, None] * b_scale
        a_scale_ptr += rows
    out_mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total.to(tl.bfloat16), mask=out_mask)


@torch.library.custom_op("megalite::fp8_cast_blocks", mutates_args=())
def _cast_blocks(x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes_NK, scale_kN = _cast_blocks_fake(x_NK, dtype)
    grid = (triton.cdiv(x_NK.shape[0], ROWS), block_count(x_NK.shape[1]))
    cast_blocks_kernel[grid](
        x_NK, codes_NK, scale_kN, *x_NK.shape, LIMIT=torch.finfo(dtype).max, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS
    )
    return codes_NK, scale_kN


@_cast_blocks.register_fake
def _cast_blocks_fake(x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, width = x_NK.shape
    scale_kN = x_NK.new_empty((block_count(width), rows), dtype=torch.float32)
    return x_NK.new_empty((rows, width), dtype=dtype), scale_kN


@torch.library.custom_op("megalite::fp8_cast_weight_blocks", mutates_args=())
def _cast_weight_blocks(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    codes_OI, scale_oi, codes_IO = _cast_weight_blocks_fake(weight_OI, dtype)
    cast_weight_blocks_kernel[tuple(scale_oi.shape)](
        weight_OI, codes_OI, codes_IO, scale_oi, *weight_OI.shape, LIMIT=torch.finfo(dtype).max, BLOCK=BLOCK,
        num_warps=WEIGHT_WARPS,
    )  # fmt: skip
    return codes_OI, scale_oi, codes_IO


@_cast_weight_blocks.register_fake
def _cast_weight_blocks_fake(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = weight_OI.shape
    scale_oi = weight_OI.new_empty((block_count(outputs), block_count(inputs)), dtype=torch.float32)
    codes_OI, codes_IO = (weight_OI.new_empty(shape, dtype=dtype) for shape in ((outputs, inputs), (inputs, outputs)))
    return codes_OI, scale_oi, codes_IO


@torch.library.custom_op("megalite::fp8_block_product", mutates_args=("out_NM",))
def _block_product(a_NK: Tensor, a_scale_kN: Tensor, b_MK: Tensor, b_scale_mk: Tensor, out_NM: Tensor) -> None:
    (rows, width), columns = a_NK.shape, b_MK.shape[0]
    tile, group, warps, stages = PRODUCT
    block_product_kernel[(triton.cdiv(rows, tile) * block_count(columns),)](
        a_NK, b_MK, out_NM, a_scale_kN, b_scale_mk, rows, columns, width, *b_scale_mk.stride(),
        BLOCK_M=tile, BLOCK=BLOCK, GROUP=group, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@_block_product.register_fake
def _block_product_fake(a_NK: Tensor, a_scale_kN: Tensor, b_MK: Tensor, b_scale_mk: Tensor, out_NM: Tensor) -> None:
    """Nothing but `out_NM` changes."""


def unsupported(x: Tensor, *rest: object) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    tensors = [x, *(other for other in rest if isinstance(other, Tensor))]
    if not all(tensor.numel() for tensor in tensors):
        return "a matrix without elements"
    if x.dim() == 2 and block_count(x.shape[1]) >= 2**16:
        return f"{x.shape[1]} columns"
    return None if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else obstacle(x)


def fp8_cast_blocks(x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `fp8_blocks.fp8_cast_blocks`."""
    check(x_NK, dtype)
    codes_NK, scale_kN = _cast_blocks(x_NK.contiguous(), dtype)
    return codes_NK, scale_kN


def fp8_cast_weight_blocks(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `fp8_blocks.fp8_cast_weight_blocks`."""
    check(weight_OI, dtype)
    codes_OI, scale_oi, codes_IO = _cast_weight_blocks(weight_OI.contiguous(), dtype)
    return codes_OI, scale_oi, codes_IO


def fp8_block_product(
    a_NK: Tensor, a_scale_kN: Tensor, b_MK: Tensor, b_scale_mk: Tensor, out_NM: Tensor | None = None
) -> Tensor:
    """As `fp8_blocks.fp8_block_product`; codes are row-major."""
    if out_NM is None:
        out_NM = a_NK.new_empty((a_NK.shape[0], b_MK.shape[0]), dtype=torch.bfloat16)
    _block_product(a_NK, a_scale_kN, b_MK, b_scale_mk, out_NM)
    return out_NM
