"""RMSNorm as a module: the operation comes from the chosen kernels, the weight from `megalite.model.build`."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.kernels import Kernels
from megalite.placement import PlacedParameter


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), statistics in fp32.

    `zero_centered`: * (1 + weight), in fp32, for the sum in bf16 would lose small weights.
    """

    def __init__(self, weight: PlacedParameter, eps: float, kernels: Kernels, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.kernels, self.zero_centered = weight, eps, kernels, zero_centered

    @property
    def factors(self) -> Tensor:
        """What the normalised elements are multiplied with."""
        return 1 + self.weight.float() if self.zero_centered else self.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.kernels.rms_norm(x, self.factors, self.eps)
        return y.to(x.dtype)

    def add_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(x + residual, norm of that sum), in one pass over memory if the kernel is fused."""
        total, y = self.kernels.add_rms_norm(x, residual, self.factors, self.eps)
        return total, y.to(total.dtype)
