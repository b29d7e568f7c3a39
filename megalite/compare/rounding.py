"""Noise, measured: the same run with every tensor rounded at random.

Where two correct runs differ, the order of a sum or the rounding of an intermediate differs. How much of that a model
passes on depends on the model, its weights and the batch, so no table of tolerances is right. It is measured: side A is
run again, and every tensor that is recorded (activations, their gradients, gradients of parameters) is moved by a
random part of a unit in the last place before it is used further, x (1 + u e) with u uniform in (-1, 1) and e the
machine epsilon. Two such runs and the first are three samples of what rounding alone can do. Source: Parker 1997,
"Monte Carlo Arithmetic"; Denis et al. 2016 ("Verificarlo") do this to every operation of a program.

Why this and not another way of the same kind:

- another split into micro-batches changes no bit of most activations, so that it would measure zero where tensor
  parallelism sums in another order;
- another blocking of the products has to be made in every kernel, and attention, norms and losses have theirs inside;
- a reference in higher precision is not to be had for fp32 runs, whose kernels keep fp32 statistics.

A unit in the last place of each factor of a product is what a sum of its terms in another order differs by: the error
of either is about e times the root of the sum of the terms' squares. The same random numbers fall on the replicas of a
tensor, which are equal in a real run as well.

With two precisions, e is that of the coarser one, and the initial weights are rounded too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

EPSILON = {"fp8": 2.0**-3, "bf16": 2.0**-7, "fp32": 2.0**-23}
"""One unit in the last place, relative to the smallest number of a binade."""


@dataclass(frozen=True)
class Rounding:
    """Random rounding number `seed` with the epsilon of a precision; `weights`: also of the initial weights."""

    seed: int
    precision: str
    weights: bool = False

    def __call__(self, values: Tensor, *key: object) -> Tensor:
        """`values`, moved; the same for equal keys."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        unit = torch.rand(values.shape, generator=generator).mul_(2.0).sub_(1.0).to(values.device)
        wide = values if values.dtype == torch.float64 else values.float()
        return (wide + wide * (EPSILON[self.precision] * unit)).to(values.dtype)

    def both_ways(self, values: Tensor, *key: object) -> Tensor:
        """The same for a tensor, and in backward for its gradient."""
        result: Tensor = _BothWays.apply(values, self, key)
        return result


class _BothWays(Function):
    spmd = "local"

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounding: Rounding, key: tuple[object, ...]) -> Tensor:
        ctx.rounding, ctx.key = rounding, key
        return rounding(values, *key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.rounding(grads[0], "gradient", *ctx.key), None, None
