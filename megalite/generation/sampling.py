"""From logits to a token: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020).

B batch, V vocabulary. Randomness comes in as one uniform number per row, so that a row's text depends on the seed and
its own number alone: neither on what else is in the batch nor on the layout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config.bounds import shown
from megalite.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 leave nothing out. Raises UserError."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature} is not a number from 0 (the likeliest token) up")
        if self.top_k < 0:
            raise UserError(
                f"top-k = {shown(self.top_k)} is below 0; give the number of tokens to choose from, 0 for all"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p = {self.top_p} is not above 0 and at most 1, the share of probability to keep")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed = {shown(self.seed)} is not a number from 0 to 2^64 - 1")

    @property
    def cuts(self) -> bool:
        """Whether any token is left out."""
        return self.top_k > 0 or self.top_p < 1


class RowStreams:
    """A stream of uniform numbers in [0, 1) for each row, that depends on (seed, row) alone."""

    def __init__(self, seed: int, rows: int) -> None:
        keys = [np.array([seed, row], dtype=np.uint64) for row in range(rows)]
        self._streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def next(self) -> Sequence[float]:
        return [stream.random() for stream in self._streams]


def sample(logits_BV: Tensor, sampling: Sampling, uniforms_B: Sequence[float]) -> Tensor:
    """The chosen tokens, int64 [B], by inverting the distribution function.

    The tokens stand in the order of their probability where some are left out, otherwise in that of their ids: a sort
    of the whole vocabulary costs more than all the rest.
    """
    if sampling.temperature < sys.float_info.min:  # one over less than that is infinite
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double()
    # The largest becomes 0 first: however small the temperature, nothing overflows to inf - inf.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if not sampling.cuts:
        return _invert(scaled_BV.softmax(-1), uniforms_B)
    values_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        values_BV = values_BV[:, : sampling.top_k]
    p_BV = values_BV.softmax(-1)
    before_BV = p_BV.cumsum(-1) - p_BV
    # The first token stays whatever its probability: nothing comes before it.
    places_B = _invert(p_BV.where(before_BV < sampling.top_p, 0.0), uniforms_B)
    return order_BV.gather(-1, places_B.unsqueeze(1)).squeeze(1)


def _invert(p_BV: Tensor, uniforms_B: Sequence[float]) -> Tensor:
    """The places, int64 [B], at which the cumulative sums pass the uniform numbers' share of the whole."""
    total_BV = p_BV.cumsum(-1)
    targets_B1 = torch.tensor(uniforms_B, dtype=torch.float64, device=p_BV.device).unsqueeze(1) * total_BV[:, -1:]
    places_B1 = torch.searchsorted(total_BV, targets_B1, right=True)
    # Rounding may carry a number to the end, where tokens without any probability can stand.
    last_B1 = p_BV.shape[1] - 1 - (p_BV > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return places_B1.minimum(last_B1).squeeze(1)
