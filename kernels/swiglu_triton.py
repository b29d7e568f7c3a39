"""SwiGLU in Triton, forward and backward, from the fused gate/up projection. Specification: `swiglu.py`.

    y = silu(g) u        dg = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))        du = dy silu(g)

Bound by memory. Bytes for N rows of 2 F inputs, b bytes an element: forward 3 N F b, backward 5 N F b, and 6 N F b
where it writes y again for a layer that did not keep it.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import as_rows, next_power_of_two, obstacle, warps_for
from .swiglu import check

BLOCK = 2048  # columns of a program


@triton.jit
def swiglu_forward_kernel(gate_up_ptr, y_ptr, inner, outer_stride, inner_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = gate_up_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype).to(tl.float32)  # rounded before the product, as the specification
    tl.store(y_ptr + row * width + column, (silu * up.to(tl.float32)).to(up.dtype), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, grad_ptr, y_ptr, dy_row_inner, dy_outer, dy_inner, inner, outer_stride, inner_stride, width,
    AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = gate_up_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride + column
    dy_at = dy_ptr + (row // dy_row_inner) * dy_outer + (row % dy_row_inner) * dy_inner + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0)
    dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up.to(tl.float32) * sigmoid * (1 + gate * (1 - sigmoid))
    out = grad_ptr + row * (2 * width) + column
    tl.store(out, dgate.to(up.dtype), mask=mask)
    tl.store(out + width, (dy * (gate * sigmoid)).to(up.dtype), mask=mask)
    if AGAIN:
        silu = (gate * sigmoid).to(up.dtype).to(tl.float32)
        tl.store(y_ptr + row * width + column, (silu * up.to(tl.float32)).to(up.dtype), mask=mask)


def _launch(width: int, rows: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(BLOCK, next_power_of_two(width))
    return (rows, triton.cdiv(width, block)), {"BLOCK": block, "num_warps": warps_for(block)}


@torch.library.custom_op("megalite::swiglu_forward", mutates_args=())
def _forward(gate_up: Tensor) -> Tensor:
    y = _forward_fake(gate_up)
    rows, width = as_rows(gate_up), y.shape[-1]
    if y.numel():
        grid, options = _launch(width, rows.count)
        swiglu_forward_kernel[grid](
            rows.tensor, y, rows.inner, rows.outer_stride, rows.inner_stride, width, **options
        )  # fmt: skip
    return y


@_forward.register_fake
def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _launch_backward(dy: Tensor, gate_up: Tensor, grad: Tensor, y: Tensor | None) -> None:
    """Write the gradient and, where it is asked for, the result."""
    if not dy.numel():
        return
    rows_dy, rows, width = as_rows(dy), as_rows(gate_up), dy.shape[-1]
    grid, options = _launch(width, rows.count)
    swiglu_backward_kernel[grid](
        rows_dy.tensor, rows.tensor, grad, grad if y is None else y,
        rows_dy.inner, rows_dy.outer_stride, rows_dy.inner_stride,
        rows.inner, rows.outer_stride, rows.inner_stride, width, AGAIN=y is not None, **options,
    )  # fmt: skip


@torch.library.custom_op("megalite::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    grad = _backward_fake(dy, gate_up)
    _launch_backward(dy, gate_up, grad, None)
    return grad


@_backward.register_fake
def _backward_fake(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


@torch.library.custom_op("megalite::swiglu_again", mutates_args=())
def _again(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    y, grad = _again_fake(dy, gate_up)
    _launch_backward(dy, gate_up, grad, y)
    return y, grad


@_again.register_fake
def _again_fake(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _forward_fake(gate_up), _backward_fake(dy, gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _backward(dy, *ctx.saved_tensors)


def unsupported(x: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    return obstacle(x)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `swiglu.swiglu`."""
    check(gate_up)
    y: Tensor = _SwiGLU.apply(gate_up)
    return y


def swiglu_again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.swiglu_again`, in one pass."""
    check(gate_up)
    pair: tuple[Tensor, Tensor] = _again(grad, gate_up)
    return pair
