"""Rotary position embedding in Triton: q and k in one launch, forward and backward. Specification: `rope.py`.

The backward of a rotation is the rotation by the opposite angle: the same kernel with sin negated, nothing saved but
the tables. Of a fused projection the same launch copies v. Bound by memory: 2 (H + K) D b bytes a token for b bytes an
element, 2 (H + 2 K) D b with v, and the tables once for all heads.

Shapes: S sequence, B batch, H query heads, K kv heads, D head dim, R rotated part of the head dim.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import next_power_of_two, obstacle, warps_for
from .rope import check, split_qkv

TILE = 2048  # elements of the first half that a program turns


@triton.jit
def _turn(
    in_ptr, out_ptr, cos, sin, s, b, batch, heads, stride_s, stride_b, stride_h, out_stride, first_head, half, width,
    TURN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, HEADS)[:, None]
    source = in_ptr + s * stride_s + b * stride_b + head.to(tl.int64) * stride_h
    target = out_ptr + (s * batch + b) * out_stride + head * width
    pair = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (pair < half)
    first = tl.load(source + pair, mask=mask, other=0.0)
    second = tl.load(source + half + pair, mask=mask, other=0.0)
    if TURN:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        first = (wide_first * cos - wide_second * sin).to(first.dtype)
        second = (wide_second * cos + wide_first * sin).to(second.dtype)
    tl.store(target + pair, first, mask=mask)
    tl.store(target + half + pair, second, mask=mask)
    if REST:  # partial rotary: the rest of the head passes through
        column = 2 * half + tl.arange(0, REST)[None, :]
        mask = (head < heads) & (column < width)
        tl.store(target + column, tl.load(source + column, mask=mask, other=0.0), mask=mask)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, cos_ptr, sin_ptr, batch, q_heads, k_heads,
    q_stride_s, q_stride_b, q_stride_h, k_stride_s, k_stride_b, k_stride_h, v_stride_s, v_stride_b, v_stride_h,
    q_out_stride, k_out_stride, v_out_stride, table_stride_s, table_stride_b, half, width,
    INVERSE: tl.constexpr, COPY: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    pair = tl.arange(0, HALF)[None, :]
    at = s * table_stride_s + b * table_stride_b + pair
    cos = tl.load(cos_ptr + at, mask=pair < half, other=0.0)
    sin = tl.load(sin_ptr + at, mask=pair < half, other=0.0)
    if INVERSE:
        sin = -sin
    block = tl.program_id(1)
    q_blocks, k_blocks = tl.cdiv(q_heads, HEADS), tl.cdiv(k_heads, HEADS)
    if block < q_blocks:
        _turn(q_ptr, q_out_ptr, cos, sin, s, b, batch, q_heads, q_stride_s, q_stride_b, q_stride_h, q_out_stride,
              block * HEADS, half, width, True, HEADS, HALF, REST)  # fmt: skip
    elif block < q_blocks + k_blocks:
        _turn(k_ptr, k_out_ptr, cos, sin, s, b, batch, k_heads, k_stride_s, k_stride_b, k_stride_h, k_out_stride,
              (block - q_blocks) * HEADS, half, width, True, HEADS, HALF, REST)  # fmt: skip
    elif COPY:
        _turn(v_ptr, v_out_ptr, cos, sin, s, b, batch, k_heads, v_stride_s, v_stride_b, v_stride_h, v_out_stride,
              (block - q_blocks - k_blocks) * HEADS, half, width, False, HEADS, HALF, REST)  # fmt: skip


Heads = tuple[Tensor, ...]
"""q and k, and v where it is to be copied: [S, B, H, D], [S, B, K, D] and [S, B, K, D]."""


def _launch(heads_in: Heads, heads_out: Heads, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Turn q and k into their places in `heads_out`, and copy v; there the heads of a token lie one after the other,
    while its tokens may be further apart."""
    copies = len(heads_in) == 3
    q_SBHD, k_SBKD, v_SBKD = ((x if x.stride(-1) == 1 else x.contiguous()) for x in (*heads_in, heads_in[1])[:3])
    q_out, k_out, v_out = (*heads_out, heads_out[1])[:3]
    sequence, batch, q_heads, width = q_SBHD.shape
    k_heads, half = k_SBKD.shape[2], cos.shape[-1] // 2
    cos, sin = cos.contiguous().float(), sin.contiguous().float()
    table_strides = (cos.stride(0), 0 if cos.dim() == 2 else cos.stride(1))
    block = next_power_of_two(half)
    heads = min(next_power_of_two(max(q_heads, k_heads)), max(1, TILE // block))
    rest = width - 2 * half
    blocks = triton.cdiv(q_heads, heads) + (1 + copies) * triton.cdiv(k_heads, heads)
    rope_kernel[(sequence * batch, blocks)](
        q_SBHD, k_SBKD, v_SBKD, q_out, k_out, v_out, cos, sin, batch, q_heads, k_heads,
        *q_SBHD.stride()[:3], *k_SBKD.stride()[:3], *v_SBKD.stride()[:3],
        q_out.stride(1), k_out.stride(1), v_out.stride(1), *table_strides, half, width,
        INVERSE=inverse, COPY=copies, HEADS=heads, HALF=block, REST=next_power_of_two(rest) if rest else 0,
        num_warps=warps_for(2 * heads * block),
    )  # fmt: skip


@torch.library.custom_op("megalite::rope", mutates_args=())
def _rope(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = _rope_fake(q_SBHD, k_SBKD, cos, sin, inverse)
    _launch((q_SBHD, k_SBKD), (q_out, k_out), cos, sin, inverse)
    return q_out, k_out


@_rope.register_fake
def _rope_fake(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q_SBHD.new_empty(q_SBHD.shape), k_SBKD.new_empty(k_SBKD.shape)


@torch.library.custom_op("megalite::rope_fused", mutates_args=())
def _fused(
    qkv_SBE: Tensor, cos: Tensor, sin: Tensor, q_heads: int, k_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned, v copied, each contiguous."""
    out = _fused_fake(qkv_SBE, cos, sin, q_heads, k_heads, width)
    _launch(split_qkv(qkv_SBE, q_heads, k_heads, width), out, cos, sin, False)
    return out


@_fused.register_fake
def _fused_fake(
    qkv_SBE: Tensor, cos: Tensor, sin: Tensor, q_heads: int, k_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (qkv_SBE.new_empty((*qkv_SBE.shape[:2], heads, width)) for heads in (q_heads, k_heads, k_heads))
    return q, k, v


@torch.library.custom_op("megalite::rope_fused_gradient", mutates_args=())
def _fused_gradient(dq_SBHD: Tensor, dk_SBKD: Tensor, dv_SBKD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of the fused projection [S, B, (H + 2 K) D]: q's and k's turned back straight into their places."""
    dqkv_SBE = _fused_gradient_fake(dq_SBHD, dk_SBKD, dv_SBKD, cos, sin)
    places = split_qkv(dqkv_SBE, dq_SBHD.shape[2], dk_SBKD.shape[2], dq_SBHD.shape[3])
    _launch((dq_SBHD, dk_SBKD, dv_SBKD), places, cos, sin, True)
    return dqkv_SBE


@_fused_gradient.register_fake
def _fused_gradient_fake(dq_SBHD: Tensor, dk_SBKD: Tensor, dv_SBKD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sequence, batch, q_heads, width = dq_SBHD.shape
    return dq_SBHD.new_empty((sequence, batch, (q_heads + 2 * dk_SBKD.shape[2]) * width))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q_out, k_out = _rope(q_SBHD, k_SBKD, cos, sin, False)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_SBHD: Tensor, dk_SBKD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dq, dk = _rope(dq_SBHD, dk_SBKD, *ctx.saved_tensors, True)
        return dq, dk, None, None


class _RopeFused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_SBE: Tensor, cos: Tensor, sin: Tensor, q_heads: int, k_heads: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        parts: tuple[Tensor, Tensor, Tensor] = _fused(qkv_SBE, cos, sin, q_heads, k_heads, width)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_SBHD: Tensor, dk_SBKD: Tensor, dv_SBKD: Tensor) -> tuple[Tensor, *tuple[None, ...]]:
        return _fused_gradient(dq_SBHD, dk_SBKD, dv_SBKD, *ctx.saved_tensors), None, None, None, None, None


def unsupported(q_SBHD: Tensor, *rest: Any, **options: Any) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    return obstacle(q_SBHD)


def rope(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rope.rope`: q and k may be views into one fused projection; the results are contiguous."""
    check(q_SBHD, k_SBKD, cos, sin)
    pair: tuple[Tensor, Tensor] = _Rope.apply(q_SBHD, k_SBKD, cos, sin)
    return pair


def rope_qkv(
    qkv_SBE: Tensor, cos: Tensor, sin: Tensor, q_heads: int, k_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rope.rope_qkv`: v is a copy, with which attention does not keep the projection; backward writes the gradient
    of the projection in one piece."""
    q_SBHD, k_SBKD, v_SBKD = split_qkv(qkv_SBE, q_heads, k_heads, width)
    check(q_SBHD, k_SBKD, cos, sin)
    if not torch.is_grad_enabled():
        return *_rope(q_SBHD, k_SBKD, cos, sin, False), v_SBKD
    parts: tuple[Tensor, Tensor, Tensor] = _RopeFused.apply(qkv_SBE, cos, sin, q_heads, k_heads, width)
    return parts
