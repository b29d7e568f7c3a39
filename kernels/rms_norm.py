"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 3): the specification in plain
PyTorch.

    y = round(x / sqrt(mean(x^2) + eps)) * weight

Statistics are fp32. The order of the casts is Llama's: the normalised value is rounded to the dtype of `x` *before* it
is multiplied by the weight (Gemma and `torch.nn.RMSNorm` multiply first; in bf16 the difference is visible in the
logits). The Triton form with the same signature is in `rms_norm_triton.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 16  # elements; on a CPU, rows are processed in pieces whose fp32 form fits in the cache


def check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """Raise ValueError if the shapes do not match; both forms of both operations call it first."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [hidden], not {tuple(weight.shape)} for x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., hidden] and scale it by `weight` [hidden]; the result has x's dtype."""
    check(x, weight)
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, both [..., hidden]: returns (residual + x, its norm).

    The sum is rounded to its dtype before the statistics are taken, so fusing changes no bit of the unfused result.
    """
    check(x, weight, residual)
    residual_out = residual + x
    return residual_out, rms_norm(residual_out, weight, eps)


def _pieces(x_NH: Tensor) -> list[slice]:
    rows, columns = x_NH.shape
    step = max(1, PIECE // columns) if x_NH.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _RMSNorm(torch.autograd.Function):
    """A hand-written backward: it saves x and one number per row, where autograd would save four fp32 copies of x.

    With n = x rstd and h = grad * weight:  dx = rstd (h - n mean(h n)),  dweight = sum over rows of grad n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_NH = x.reshape(-1, x.shape[-1])
        out_NH = torch.empty_like(x_NH, dtype=torch.promote_types(x.dtype, weight.dtype))
        wide = torch.promote_types(x.dtype, torch.float32)
        rstd_N1 = torch.empty((len(x_NH), 1), dtype=wide, device=x.device)
        for rows in _pieces(x_NH):
            x_nH = x_NH[rows].to(wide)
            rstd_N1[rows] = torch.rsqrt(x_nH.square().mean(-1, keepdim=True) + eps)
            torch.mul((x_nH * rstd_N1[rows]).to(x.dtype), weight, out=out_NH[rows])
        ctx.save_for_backward(x, weight, rstd_N1)
        return out_NH.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd_N1 = ctx.saved_tensors
        x_NH, grad_NH = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        grad_x_NH = torch.empty_like(x_NH)
        weight_H = weight.to(rstd_N1.dtype)
        grad_weight_H = torch.zeros_like(weight_H)
        for rows in _pieces(x_NH):
            normed_nH = x_NH[rows] * rstd_N1[rows]
            grad_nH = grad_NH[rows].to(normed_nH.dtype)
            product_nH = grad_nH * normed_nH
            grad_weight_H += product_nH.sum(0)
            mean_n1 = (product_nH @ weight_H).div_(x.shape[-1]).unsqueeze(-1)
            grad_x_NH[rows] = (grad_nH * weight_H).addcmul_(normed_nH, mean_n1, value=-1).mul_(rstd_N1[rows])
        return grad_x_NH.view(x.shape), grad_weight_H.to(weight.dtype), None
