"""From logits to a token: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020).

B batch, V vocabulary. Randomness comes in as one uniform number per row, so that a row's text depends on the seed and
its own number alone: neither on what else is in the batch nor on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
            raise UserError(f"top-k = {self.top_k} is below 0; give the number of tokens to choose from, 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p = {self.top_p} is not above 0 and at most 1, the share of probability to keep")
        if self.seed < 0:
            raise UserError(f"seed = {self.seed} is below 0; give a number from 0 up")


class RowStreams:
    """A stream of uniform numbers in [0, 1) for each row, that depends on (seed, row) alone."""

    def __init__(self, seed: int, rows: int) -> None:
        low = seed & ((1 << 64) - 1)
        keys = [np.array([low, row], dtype=np.uint64) for row in range(rows)]
        self._streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def next(self) -> Sequence[float]:
        return [stream.random() for stream in self._streams]


def sample(logits_BV: Tensor, sampling: Sampling, uniforms_B: Sequence[float]) -> Tensor:
    """The chosen tokens, int64 [B], by inverting the distribution function of the tokens in order of probability."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    values_BV, order_BV = (logits_BV.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        values_BV = values_BV[:, : sampling.top_k]
    p_BV = values_BV.softmax(-1)
    before_BV = p_BV.cumsum(-1) - p_BV
    # The first token stays whatever its probability: nothing comes before it.
    p_BV = p_BV.where(before_BV < sampling.top_p, 0.0)
    total_BV = p_BV.cumsum(-1)
    targets_B1 = torch.tensor(uniforms_B, dtype=torch.float64, device=p_BV.device).unsqueeze(1) * total_BV[:, -1:]
    last_B1 = (p_BV > 0).sum(-1, keepdim=True) - 1
    places_B1 = torch.searchsorted(total_BV, targets_B1, right=True).minimum(last_B1)
    return order_BV.gather(-1, places_B1).squeeze(1)
