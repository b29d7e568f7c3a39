"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.2.2): the specification in plain PyTorch.

Half-split layout (`rotate_half` of GPT-NeoX and Hugging Face Llama): element i of a head is paired with element
i + D_rot / 2. Positions come in through cos and sin, so documents packed in one sequence restart theirs by their
tables. The Triton form with the same signature is in `rope_triton.py`.

Shapes: S sequence, B batch, H query heads, K kv heads, D head dim, R rotated part of the head dim (R <= D).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 16  # elements; on a CPU, positions are processed in pieces whose fp32 form fits in the cache


def check(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError if the shapes do not match; both forms call it first."""
    (sequence, batch, _, width), rotated = q_SBHD.shape, cos.shape[-1]
    if k_SBKD.shape[:2] != (sequence, batch) or k_SBKD.shape[3:] != (width,):
        raise ValueError(f"k must be [S, B, K, D], not {tuple(k_SBKD.shape)} for q {tuple(q_SBHD.shape)}")
    if cos.shape != sin.shape or cos.shape[:-1] not in ((sequence,), (sequence, batch)):
        raise ValueError(f"cos and sin must be [S, R] or [S, B, R], not {tuple(cos.shape)} and {tuple(sin.shape)}")
    if rotated > width or rotated % 2:
        raise ValueError(f"the rotated part of a head must be even and at most {width}, not {rotated}")


def rope(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R elements of every head of q and k by the angles in `cos` and `sin`; the rest passes through.

    cos, sin: fp32 [S, R] (one position per row) or [S, B, R] (positions per document), the two halves of R equal: only
    the first is read. The rotation is computed in fp32 and rounded once to the dtype of the input. q and k may be
    strided.
    """
    check(q_SBHD, k_SBKD, cos, sin)
    return _rotate(q_SBHD, cos, sin), _rotate(k_SBKD, cos, sin)


def split_qkv(qkv_SBE: Tensor, q_heads: int, k_heads: int, width: int) -> tuple[Tensor, ...]:
    """The views q [S, B, H, D], k and v [S, B, K, D] of a fused projection; ValueError if it has other heads."""
    if qkv_SBE.dim() != 3 or qkv_SBE.shape[2] != (q_heads + 2 * k_heads) * width:
        heads = f"{q_heads} + 2 * {k_heads} heads of {width}"
        raise ValueError(f"qkv must be [S, B, E] with {heads}, not {tuple(qkv_SBE.shape)}")
    return qkv_SBE.unflatten(-1, (-1, width)).split((q_heads, k_heads, k_heads), 2)


def rope_qkv(
    qkv_SBE: Tensor, cos: Tensor, sin: Tensor, q_heads: int, k_heads: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of a fused projection [S, B, (H + 2 K) D], rotated as by `rope`, and v.

    A fused form may copy v, so that what attention keeps of it does not keep the whole projection.
    """
    q_SBHD, k_SBKD, v_SBKD = split_qkv(qkv_SBE, q_heads, k_heads, width)
    return *rope(q_SBHD, k_SBKD, cos, sin), v_SBKD


def _rotate(x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated: Tensor = _Rotation.apply(x_SBND, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, so x is not saved."""

    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x_SBND, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBND: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_SBND, cos, -sin), None, None


def _turn(x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    wide = torch.promote_types(x_SBND.dtype, torch.float32)
    cos, sin = (_per_head(table)[..., :half].to(wide) for table in (cos, sin))
    out_SBND = torch.empty(x_SBND.shape, dtype=x_SBND.dtype, device=x_SBND.device)
    out_SBND[..., 2 * half :] = x_SBND[..., 2 * half :]
    length, elements = len(x_SBND), x_SBND.numel()
    step = max(1, length * PIECE // max(elements, 1)) if x_SBND.device.type == "cpu" else max(length, 1)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        first, second = x_SBND[rows, ..., : 2 * half].to(wide).chunk(2, dim=-1)
        out_SBND[rows, ..., :half] = (first * cos[rows]).addcmul_(second, sin[rows], value=-1)
        out_SBND[rows, ..., half : 2 * half] = (second * cos[rows]).addcmul_(first, sin[rows])
    return out_SBND


def _per_head(table: Tensor) -> Tensor:
    """[S, R] -> [S, 1, 1, R] and [S, B, R] -> [S, B, 1, R]."""
    return table[:, None, None] if table.dim() == 2 else table[:, :, None]
