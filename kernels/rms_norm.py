"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 3): the specification in plain
PyTorch.

    y = round(x / sqrt(mean(x^2) + eps)) * weight

Statistics are fp32. The order of the casts is Llama's: the normalised value is rounded to the dtype of `x` *before* it
is multiplied by the weight (Gemma and `torch.nn.RMSNorm` multiply first; in bf16 the difference is visible in the
logits). The Triton form with the same signature is in `rms_norm_triton.py`.
"""

import torch
from torch import Tensor


def check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """Raise ValueError where the shapes do not fit together; both forms of both operations begin with it."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [hidden], not {tuple(weight.shape)} for x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., hidden] and scale it by `weight` [hidden]; the result has x's dtype."""
    check(x, weight)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, both [..., hidden]: returns (residual + x, its norm).

    The sum is rounded to its dtype before the statistics are taken, so fusing changes no bit of the unfused result.
    """
    check(x, weight, residual)
    residual_out = residual + x
    return residual_out, rms_norm(residual_out, weight, eps)
