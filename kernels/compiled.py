"""The element-wise operations through torch.compile: each becomes one pass over memory on a CPU.

Only what has no matrix product is compiled, so a graph is small, is compiled once for a shape, and takes part in
autograd like any function. Products stay with the libraries that are best at them, and the tensor-parallel layers,
whose weight gradients are side effects, stay as they are.
"""

import dataclasses
import shutil
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.errors import UserError

from .dispatch import OPERATIONS, Kernels

COMPILERS = ("g++", "clang++", "c++")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm.rms_norm`; the compiler makes the backward."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm.add_rms_norm`."""
    residual_out = residual + x
    return residual_out, rms_norm(residual_out, weight, eps)


def rope(q_SBHD: Tensor, k_SBKD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rope.rope`; the compiler makes the backward."""
    half = cos.shape[-1] // 2

    def rotate(x_SBND: Tensor) -> Tensor:
        wide = torch.promote_types(x_SBND.dtype, torch.float32)
        c, s = ((t[:, None, None] if t.dim() == 2 else t[:, :, None])[..., :half].to(wide) for t in (cos, sin))
        first, second = x_SBND[..., :half].to(wide), x_SBND[..., half : 2 * half].to(wide)
        turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x_SBND.dtype)
        return torch.cat([turned, x_SBND[..., 2 * half :]], dim=-1)

    return rotate(q_SBHD), rotate(k_SBKD)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `swiglu.swiglu`; the compiler makes the backward, which keeps no more than the fused input either."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def cross_entropy_stats(
    logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int = 0, valid: int | None = None
) -> Tensor:
    """As `cross_entropy.cross_entropy_stats`, the whole of the rows at once."""
    valid = logits_NV.shape[1] if valid is None else valid
    z_NV = logits_NV[:, :valid].to(torch.promote_types(logits_NV.dtype, torch.float32))
    max_N = z_NV.amax(-1)
    hit_NV = torch.arange(valid, device=logits_NV.device) + vocab_start == targets_N[:, None]
    sum_N = (z_NV - max_N[:, None]).exp().sum(-1)
    return torch.stack([max_N, sum_N, z_NV.where(hit_NV, 0).sum(-1), z_NV.sum(-1)], dim=-1)


def cross_entropy_grad_(
    logits_NV: Tensor,
    targets_N: Tensor,
    stats_N4: Tensor,
    grad_N: Tensor,
    *,
    vocab_start: int = 0,
    valid: int | None = None,
    z_loss: float = 0.0,
    vocab_size: int,
) -> Tensor:
    """As `cross_entropy.cross_entropy_grad_`, the whole of the rows at once."""
    max_N, sum_N = stats_N4[:, 0], stats_N4[:, 1]
    column_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    factor_N = grad_N * (1 + 2 * z_loss * (sum_N.log() + max_N)) / sum_N
    grad_NV = (logits_NV.to(stats_N4.dtype) - max_N[:, None]).exp() * factor_N[:, None]
    grad_NV = grad_NV - grad_N[:, None].where(column_V + vocab_start == targets_N[:, None], 0)
    if valid is not None:
        grad_NV = grad_NV.where(column_V < valid, 0)
    logits_NV.copy_(grad_NV.where(grad_N[:, None] != 0, 0))
    return logits_NV


def cross_entropy_stats_grad_(
    logits_NV: Tensor, targets_N: Tensor, grad_N: Tensor, *, valid: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """Both of the above where one rank holds the whole vocabulary."""
    size = logits_NV.shape[1] if valid is None else valid
    stats_N4 = cross_entropy_stats(logits_NV, targets_N, valid=size)
    cross_entropy_grad_(logits_NV, targets_N, stats_N4, grad_N, valid=size, z_loss=z_loss, vocab_size=size)
    return stats_N4


_FORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "swiglu": swiglu,
    "cross_entropy_stats": cross_entropy_stats,
    "cross_entropy_grad_": cross_entropy_grad_,
    "cross_entropy_stats_grad_": cross_entropy_stats_grad_,
}
"""Function of `Kernels` -> what is compiled in place of the plain form."""

_OPERATIONS = ("rms_norm", "rope", "swiglu", "cross_entropy")


def refuse_without_compiler() -> None:
    """Raises UserError where torch.compile would find no C++ compiler."""
    if not any(shutil.which(name) for name in COMPILERS):
        raise UserError(f"train.compile = true: no C++ compiler is installed ({', '.join(COMPILERS)}); set it to false")


def compile_kernels(kernels: Kernels) -> Kernels:
    """`kernels` with the plain forms of element-wise operations compiled; Triton kernels stay as they are."""
    refuse_without_compiler()
    functions: dict[str, Any] = {}
    choices = dict(kernels.choices)
    for operation in _OPERATIONS:
        if not choices[operation].startswith("reference"):
            continue
        choices[operation] = "compiled " + choices[operation]
        functions |= {name: torch.compile(_FORMS[name], dynamic=False) for name in OPERATIONS[operation]}
    return dataclasses.replace(kernels, **functions, choices=MappingProxyType(choices))
