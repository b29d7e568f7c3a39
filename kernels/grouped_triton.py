"""Grouped products in Triton: groups of rows, each times its own matrix. Specification: `grouped.py`.

The ends of the groups stay on the GPU: as many programs start as there could be tiles, and each finds its group and
rows from the ends by itself, so that the host never waits for them. Flop: 2 N I O for each of the three. Bytes, b an
element: b (N I + G I O + N O), and for the weights' gradient b N (I + O) + 8 G I O.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped import check
from .layout import next_power_of_two, obstacle

Tiles = tuple[int, int, int, int, int]
"""(rows, columns, depth, warps, stages)"""

TILES: Tiles = (128, 128, 64, 8, 3)
FP32_TILES: Tiles = (32, 32, 32, 4, 2)
"""fp32 products are for tests and small models, they are not tuned."""


@triton.jit
def grouped_rows_kernel(
    x_ptr, weight_ptr, y_ptr, ends_ptr, groups, depth, width, x_stride, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y = x W_g^T for weight [G, width, depth] (WIDE), or of x W_g for [G, depth, width]."""
    tile = tl.program_id(0)
    index = tl.arange(0, GROUPS)
    end = tl.load(ends_ptr + index, mask=index < groups, other=0).to(tl.int32)
    begin = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index < groups), other=0).to(tl.int32)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    here = index == group
    if group < groups:
        first = tl.sum(tl.where(here, begin + (tile - last + tiles) * BLOCK_M, 0), 0)
        stop = tl.sum(tl.where(here, end, 0), 0)
        rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask, column_mask = (rows < stop)[:, None], (columns < width)[None, :]
        matrix = weight_ptr + group.to(tl.int64) * depth * width
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, depth, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + inner[None, :], mask=row_mask & (inner < depth)[None, :], other=0.0
            )
            if WIDE:
                at = matrix + columns[None, :] * depth + inner[:, None]
            else:
                at = matrix + inner[:, None] * width + columns[None, :]
            weight = tl.load(at, mask=column_mask & (inner < depth)[:, None], other=0.0)
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        out = y_ptr + rows[:, None] * width + columns[None, :]
        tl.store(out, total.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def grouped_weights_kernel(
    dy_ptr, x_ptr, total_ptr, ends_ptr, outputs, inputs, dy_stride, x_stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of total_g += dy^T x over the rows of a group, total [G, outputs, inputs]."""
    group = tl.program_id(1)
    across = tl.cdiv(inputs, BLOCK_N)
    stop = tl.load(ends_ptr + group).to(tl.int32)
    begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0).to(tl.int32)
    if begin < stop:
        m = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(begin, stop, BLOCK_K):
            rows = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside = rows < stop
            dy = tl.load(
                dy_ptr + rows[None, :] * dy_stride + m[:, None],
                mask=inside[None, :] & (m < outputs)[:, None],
                other=0.0,
            )
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + n[None, :], mask=inside[:, None] & (n < inputs)[None, :], other=0.0
            )
            total = tl.dot(dy, x, total, input_precision=PRECISION)
        matrix = total_ptr + group.to(tl.int64) * outputs * inputs
        at = matrix + m[:, None] * inputs + n[None, :]
        mask = (m < outputs)[:, None] & (n < inputs)[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def tiles_of(x: Tensor) -> tuple[Tiles, str]:
    """Tile sizes and the precision of products."""
    if x.dtype != torch.float32:
        return TILES, "tf32"
    exact = x.device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32
    return FP32_TILES, "ieee" if exact else "tf32"


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _multiply(x_NK: Tensor, weight: Tensor, ends_G: Tensor, wide: bool) -> Tensor:
    x_NK, weight, ends_G = _rows(x_NK), weight.contiguous(), ends_G.contiguous()
    depth, width = weight.shape[1:][::-1] if wide else weight.shape[1:]
    y = x_NK.new_empty((x_NK.shape[0], width))
    groups = ends_G.numel()
    if y.numel():
        (rows, columns, inner, warps, stages), precision = tiles_of(x_NK)
        grid = (triton.cdiv(x_NK.shape[0], rows) + groups, triton.cdiv(width, columns))
        grouped_rows_kernel[grid](
            x_NK, weight, y, ends_G, groups, depth, width, x_NK.stride(0), PRECISION=precision, WIDE=wide,
            GROUPS=next_power_of_two(groups), BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=inner, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return y


def unsupported(rows: Tensor, other: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    return obstacle(rows) or obstacle(other)


def grouped_product(x_NI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped.grouped_product`."""
    check(x_NI, weight_GOI, ends_G, 2)
    return _multiply(x_NI, weight_GOI, ends_G, wide=True)


def grouped_input_gradient(grad_NO: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped.grouped_input_gradient`."""
    check(grad_NO, weight_GOI, ends_G, 1)
    return _multiply(grad_NO, weight_GOI, ends_G, wide=False)


def grouped_weight_gradient_(total_GOI: Tensor, grad_NO: Tensor, x_NI: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped.grouped_weight_gradient_`."""
    check(x_NI, total_GOI, ends_G, 2)
    check(grad_NO, total_GOI, ends_G, 1)
    if x_NI.shape[0]:
        grad_NO, x_NI = _rows(grad_NO), _rows(x_NI)
        (block_m, block_n, inner, warps, stages), precision = tiles_of(x_NI)
        groups, outputs, inputs = total_GOI.shape
        grid = (triton.cdiv(outputs, block_m) * triton.cdiv(inputs, block_n), groups)
        grouped_weights_kernel[grid](
            grad_NO, x_NI, total_GOI, ends_G.contiguous(), outputs, inputs, grad_NO.stride(0), x_NI.stride(0),
            PRECISION=precision, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=inner, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return total_GOI
