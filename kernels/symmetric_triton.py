"""Symmetric products in Triton: the tiles on and below the diagonal are computed, and the elements there written twice.
Specification: `symmetric.py`.

Flop: R (R + tile) C, where a plain product takes 2 R R C. Bytes, b an element: b (R C + R R), and b R R / 2 for the
addend. Half of the programs end at once; a grid of the needed half alone would take a square root in each.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_triton import FP32_TILES, Tiles
from .layout import obstacle
from .symmetric import check

TILES: Tiles = (128, 128, 64, 8, 3)
"""(rows, columns, depth, warps, stages); rows and columns must be equal, so that a tile's mirror image is a tile."""


@triton.jit
def symmetric_kernel(
    a_ptr, addend_ptr, out_ptr, rows, depth, row_stride, column_stride, addend_stride, alpha, beta,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of alpha A A^T + beta D for A [rows, depth], and its mirror image."""
    if tl.program_id(1) <= tl.program_id(0):
        below = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        across = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        below_mask, across_mask = (below < rows)[:, None], (across < rows)[None, :]
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, depth, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            left = tl.load(
                a_ptr + below[:, None] * row_stride + inner[None, :] * column_stride,
                mask=below_mask & (inner < depth)[None, :],
                other=0.0,
            )
            right = tl.load(
                a_ptr + across[None, :] * row_stride + inner[:, None] * column_stride,
                mask=across_mask & (inner < depth)[:, None],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision=PRECISION)
        total *= alpha
        # Of a tile on the diagonal too one half alone: a product need not round both alike.
        place = tl.arange(0, BLOCK)
        lower = (place[:, None] >= place[None, :]) | (tl.program_id(1) < tl.program_id(0))
        mask = below_mask & lower
        if ADD:
            addend = tl.load(addend_ptr + below[:, None] * addend_stride + across[None, :], mask=mask, other=0.0)
            total += beta * addend.to(tl.float32)
        value = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + below[:, None] * rows + across[None, :], value, mask=mask)
        tl.store(out_ptr + across[None, :] * rows + below[:, None], value, mask=mask)


def unsupported(a_RC: Tensor, addend_RR: Tensor | None = None, **options: Any) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    reach = sum((size - 1) * abs(stride) for size, stride in zip(a_RC.shape, a_RC.stride()))
    if max(reach, a_RC.shape[0] ** 2) >= 2**31:  # offsets of 64 bits would not fit the registers
        return f"a matrix of {tuple(a_RC.shape)} reaches beyond 2^31 elements"
    return obstacle(a_RC) or (obstacle(addend_RR) if addend_RR is not None else None)


def symmetric_product(
    a_RC: Tensor, addend_RR: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """As `symmetric.symmetric_product`; exactly symmetric."""
    check(a_RC, addend_RR)
    rows, depth = a_RC.shape
    out = a_RC.new_empty((rows, rows))
    if not out.numel():
        return out
    addend = out if addend_RR is None else addend_RR if addend_RR.stride(1) == 1 else addend_RR.contiguous()
    block, _, inner, warps, stages = TILES if a_RC.dtype != torch.float32 else FP32_TILES
    exact = a_RC.device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32
    grid = (triton.cdiv(rows, block), triton.cdiv(rows, block))
    symmetric_kernel[grid](
        a_RC, addend, out, rows, depth, a_RC.stride(0), a_RC.stride(1), addend.stride(0), alpha, beta,
        ADD=addend_RR is not None, PRECISION="ieee" if exact and a_RC.dtype == torch.float32 else "tf32", BLOCK=block,
        BLOCK_K=inner, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
