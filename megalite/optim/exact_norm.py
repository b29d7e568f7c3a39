"""The gradient norm as an exact sum: the same bits however the gradients are cut into ranks, buckets and shards.

Every gradient is divided by a power of two not below the largest of the whole model, so that its square, which is
exact in float64, is at most 1. The square is split into two whole numbers, multiples of 2^-36 and of 2^-72. Whole
numbers add up exactly in any order. What is below 2^-73 of the largest square is lost, of every element alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.optim.grad_norm import GradientNorm
from megalite.parallel.zero import StageBuckets

_BITS = 36
_PIECE = 1 << 16
"""Elements: so many whole numbers up to 2^36 have a sum below 2^53, which float64 holds exactly."""

_LOW = (1 << 26) - 1


class ExactNorm(GradientNorm):
    """A `GradientNorm` whose sum over all elements of all ranks is independent of the layout. It communicates."""

    def __init__(self, stages: list[StageBuckets], mesh: Mesh, kernels: Kernels) -> None:
        super().__init__(stages, mesh.rank, kernels)
        self._world, self._first = mesh.world, mesh.rank == 0

    def local_square_sum(self) -> Tensor:
        """fp64 scalar: the squared global norm on rank 0 and zero elsewhere; not finite where a gradient is not."""
        largest = self._zero.clone()
        for gradient in self._owned:
            largest = torch.maximum(largest, gradient.abs().max().double())
        if self._world.size > 1:
            largest = largest.nan_to_num(nan=math.inf)  # some backends lose a NaN in a maximum
        self._world.all_reduce(largest, "max").wait()
        top = largest.item()
        if top == 0.0 or not math.isfinite(top):
            return largest if self._first else self._zero.clone()
        _, exponent = math.frexp(top)
        counts = torch.zeros(4, dtype=torch.int64, device=largest.device)
        for gradient in self._owned:
            for piece in gradient.split(_PIECE):
                counts += _count(piece, exponent)
        self._world.all_reduce(counts).wait()
        tops, rests = counts.view(2, 2).t().tolist()
        high, low = (top * (_LOW + 1) + rest for top, rest in zip(tops, rests))
        total = math.ldexp(float((high << _BITS) + low), 2 * (exponent - _BITS))
        return self._zero + total if self._first else self._zero.clone()


def _count(piece: Tensor, exponent: int) -> Tensor:
    """The two whole sums over the squares of some fp32 elements, each as (multiples of 2^26, rest), int64 [4]."""
    squares = piece.double().mul_(math.ldexp(1.0, -exponent)).square_().mul_(float(1 << _BITS))
    whole = squares.round()
    sums = torch.stack((whole.sum(), squares.sub_(whole).mul_(float(1 << _BITS)).round_().sum())).long()
    return torch.stack((sums >> 26, sums & _LOW), 1).flatten()
