"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum; one state tensor instead of two.

[optimizer]
kind = "lion:Lion"
beta2 = 0.99
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalite.config import OptimizerConfig
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.optim.shard import Segment

MOMENTUM = "momentum"


class Lion:
    """Its state in a segment is `momentum`, fp32."""

    name = "Lion"

    def __init__(self, config: OptimizerConfig, kernels: Kernels, mesh: Mesh) -> None:
        self.config = config

    def prepare(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            segment.state[MOMENTUM] = torch.zeros_like(segment.master.data)

    def update(self, segments: Sequence[Segment], *, lr: float, gradient_scale: float, step: int) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        for segment in segments:
            assert segment.gradient is not None
            gradient = segment.gradient.mul_(gradient_scale)
            momentum, weights = segment.state[MOMENTUM], segment.master
            if segment.bucket.decays:
                weights.mul_(1 - lr * self.config.weight_decay)
            weights.add_(torch.lerp(gradient, momentum, beta1).sign_(), alpha=-lr)
            momentum.lerp_(gradient, 1 - beta2)
            segment.write_back()
