"""RMSNorm as a module: the operation comes from the chosen kernels, the weight from `megalite.model.build`."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.kernels import Kernels
from megalite.placement import PlacedParameter


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), statistics in fp32."""

    def __init__(self, weight: PlacedParameter, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.eps, self.kernels = weight, eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, norm of that sum), in one pass over memory if the kernel is fused."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
