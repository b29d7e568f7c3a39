"""RMSNorm in Triton, forward and backward, alone or fused with the residual addition. Specification: `rms_norm.py`.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and y = n w, and c = mean over a row of (dy w n):

    dx = r (dy w - n c)  [+ the gradient that reaches the residual stream directly]        dw = sum over rows of dy n

Both directions are bound by memory. Bytes for N rows of width h, b bytes an element: forward 2 N h b, fused 4 N h b;
backward 3 N h b, fused 4 N h b; plus the weights. The backward starts a fixed number of programs; each sums its rows'
share of dw in registers and writes it once, and a second launch adds the shares in a fixed order: the same bits every
time, no atomics.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import as_rows, next_power_of_two, obstacle, program_count, warps_for
from .rms_norm import check

WIDEST = 16384  # a row is one tile; above this the backward's accumulators no longer fit the register file
KEPT = tl.constexpr(8192)  # columns of the weight that the backward keeps in registers from row to row
TILE = 4096  # elements: narrow rows (the norms of single heads) share a program until its tile is this large


@triton.jit
def _row_offsets(row, inner, outer_stride, inner_stride):
    row = row.to(tl.int64)
    return ((row // inner) * outer_stride + (row % inner) * inner_stride)[:, None]


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr,
    rows, inner, x_outer, x_inner, residual_row_inner, residual_outer, residual_inner, hidden, eps,
    FUSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < hidden)
    out = row.to(tl.int64)[:, None] * hidden + column
    x = tl.load(x_ptr + _row_offsets(row, inner, x_outer, x_inner) + column, mask=mask, other=0.0)
    if FUSED:
        at = _row_offsets(row, residual_row_inner, residual_outer, residual_inner) + column
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out, x, mask=mask)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / hidden + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0).to(tl.float32)
    normalised = (wide * rstd[:, None]).to(x.dtype)  # rounded before the weight: Llama's order
    tl.store(y_ptr + out, (normalised.to(tl.float32) * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, share_ptr,
    rows, dy_row_inner, dy_outer, dy_inner, dsum_row_inner, dsum_outer, dsum_inner, x_row_inner, x_outer, x_inner,
    hidden, FUSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    if BLOCK <= KEPT:
        weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    share = tl.zeros([1, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < hidden)
        x = tl.load(x_ptr + _row_offsets(row, x_row_inner, x_outer, x_inner) + column, mask=mask, other=0.0)
        dy_at = _row_offsets(row, dy_row_inner, dy_outer, dy_inner) + column
        dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normalised = x.to(tl.float32) * rstd
        share += tl.sum(dy * normalised.to(x.dtype).to(tl.float32), axis=0)[None, :]
        if BLOCK > KEPT:  # wide rows fill the registers: their weight is read again, from the cache, for each
            weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
        dy *= weight.to(tl.float32)
        dx = rstd * (dy - normalised * (tl.sum(dy * normalised, axis=1)[:, None] / hidden))
        if FUSED:
            at = _row_offsets(row, dsum_row_inner, dsum_outer, dsum_inner) + column
            dx += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out = row.to(tl.int64)[:, None] * hidden + column
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(share_ptr + tl.program_id(0).to(tl.int64) * hidden + column, share, mask=column < hidden)


def _tile(hidden: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program's tile."""
    block = next_power_of_two(hidden)
    rows = max(1, TILE // block)
    return rows, block, warps_for(rows * block)


@torch.library.custom_op("megalite::rms_norm_forward", mutates_args=())
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """Returns [y, rstd] and, with a residual, [y, rstd, residual + x]; rstd is fp32 with one number per row."""
    hidden = x.shape[-1]
    rows_x = as_rows(x)
    rows_r = as_rows(residual) if residual is not None else rows_x
    outputs = _forward_fake(x, residual, weight, eps)
    y, rstd = outputs[:2]
    tile_rows, block, warps = _tile(hidden)
    rms_norm_forward_kernel[(triton.cdiv(rows_x.count, tile_rows),)](
        rows_x.tensor, rows_r.tensor, weight.contiguous(), outputs[-1], y, rstd,
        rows_x.count, rows_x.inner, rows_x.outer_stride, rows_x.inner_stride,
        rows_r.inner, rows_r.outer_stride, rows_r.inner_stride, hidden, eps,
        FUSED=residual is not None, ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return outputs


@_forward.register_fake
def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    stream = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=torch.promote_types(stream, weight.dtype))
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return [y, rstd] if residual is None else [y, rstd, x.new_empty(x.shape, dtype=stream)]


@torch.library.custom_op("megalite::rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (plus `dsum`, what reaches the sum directly) and of the weight."""
    hidden = x.shape[-1]
    rows_x, rows_dy = as_rows(x), as_rows(dy)
    rows_d = as_rows(dsum) if dsum is not None else rows_dy
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile_rows, block, warps = _tile(hidden)
    programs = max(1, min(program_count(x.device), triton.cdiv(rows_x.count, tile_rows)))
    shares = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(programs,)](
        rows_dy.tensor, rows_d.tensor, rows_x.tensor, weight.contiguous(), rstd, dx, shares,
        rows_x.count, rows_dy.inner, rows_dy.outer_stride, rows_dy.inner_stride,
        rows_d.inner, rows_d.outer_stride, rows_d.inner_stride,
        rows_x.inner, rows_x.outer_stride, rows_x.inner_stride, hidden,
        FUSED=dsum is not None, ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx, shares.sum(0).to(weight.dtype)


@_backward.register_fake
def _backward_fake(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = _backward(dy, None, *ctx.saved_tensors)
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd, residual_out = _forward(x, residual, weight, eps)
        ctx.save_for_backward(residual_out, weight, rstd)
        ctx.dtypes = x.dtype, residual.dtype
        return residual_out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight = _backward(dy, dsum, *ctx.saved_tensors)
        return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dweight, None


def unsupported(x: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} elements are wider than {WIDEST}"
    return obstacle(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm.rms_norm`; any strides, copied only where two strides do not describe the rows."""
    check(x, weight)
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.add_rms_norm`, in one pass over memory."""
    check(x, weight, residual)
    pair: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, residual, weight, eps)
    return pair
