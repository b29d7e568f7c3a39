"""RMSNorm as a module: the operation comes from the chosen kernels, the placement from here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megalite.kernels import Kernels
from megalite.placement import PlacedParameter, Placement, row_box


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), statistics in fp32.

    `replicas` hold the same weight; `partial` where each of them normalises other tokens or heads than the rest.
    """

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        replicas: tuple[int, ...],
        kernels: Kernels,
        *,
        partial: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        box = row_box(name, (size,), 0, size, 0, replicas, partial=partial and len(replicas) > 1)
        self.weight = PlacedParameter(torch.empty(size, **kwargs), Placement((box,), init="ones"))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, norm of that), in one pass over memory where the kernel can."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
