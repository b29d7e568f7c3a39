"""From logits to a token: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020).

A token is drawn by inverting the distribution function at one uniform number, which depends on the seed, the row's
number and the position in its answer alone (counter-based Philox, Salmon et al. 2011). So a row's text depends neither
on what else is in the batch, nor on the layout, nor on which rows have finished.

B batch, V vocabulary, K likeliest tokens, N blocks of the vocabulary, W tokens of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config.bounds import shown
from megalite.errors import UserError

_BLOCK = 512
"""Tokens whose probabilities are summed in fp32 before the search; only one block a row is then searched token by
token."""

_FIRST_CUT = 128
"""How many of the likeliest tokens top-p looks at first; four times as many whenever they are not enough."""

_PHILOX_LANES = 4
"""Numbers that one value of Philox's counter gives."""

_COLDEST = torch.finfo(torch.float32).tiny
"""Below this temperature differences of fp32 logits divided by it may be infinite: the likeliest token is taken."""


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

    def check_fixed_shapes(self) -> None:
        """Raise UserError where more may have to be sorted than is known before, which no CUDA graph can record."""
        if self.top_p < 1 and not self.top_k and not self.greedy:
            raise UserError(
                f"top-p = {self.top_p} alone sorts as many tokens as it turns out to need, which a CUDA graph cannot "
                "record; give top-k as well, or generate without a graph"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < _COLDEST

    @property
    def cuts(self) -> bool:
        """Whether any token is left out."""
        return self.top_k > 0 or self.top_p < 1


def uniforms(seed: int, rows: Sequence[int], first: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for positions `first` … `first + count - 1` of each row, float64 [rows, count].

    `rows` are global numbers. Philox is keyed by (seed, row) and counts positions, so none has to be drawn before
    another.
    """
    numbers = np.empty((len(rows), count))
    skipped = first % _PHILOX_LANES
    for index, row in enumerate(rows):
        bits = np.random.Philox(key=np.array([seed, row], dtype=np.uint64)).advance(first // _PHILOX_LANES)
        numbers[index] = np.random.Generator(bits).random(skipped + count)[skipped:]
    return numbers


def sample(
    logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor, *, sampler_logprobs: bool = False
) -> tuple[Tensor, Tensor]:
    """One token a row, int64 [B], and the natural logarithm of its probability, fp32 [B].

    The probability is the model's, over all tokens at temperature 1, or with `sampler_logprobs` that of the
    distribution drawn from: at its temperature, among the tokens that top-k and top-p keep (1 at temperature 0).
    `uniforms_B` is float64. Where some tokens are left out, the others stand in the order of their probability,
    otherwise in that of their ids, and nothing is sorted. Logits that are not finite give log-probabilities that are
    not either.
    """
    # The largest becomes 0 first: however small the temperature, nothing overflows to inf - inf.
    relative_BV = logits_BV.float() - logits_BV.amax(-1, keepdim=True)
    temperature = sampling.temperature
    if sampling.greedy:
        tokens_B = logits_BV.argmax(-1)
        logprobs_B = _take(relative_BV, tokens_B)
    elif sampling.top_k:
        scaled_BK, order_BK = (relative_BV / temperature).topk(min(sampling.top_k, relative_BV.shape[1]))
        weights_BK = scaled_BK.double().exp()
        places_B, logprobs_B = _draw_nucleus(weights_BK, sampling.top_p * weights_BK.sum(-1), uniforms_B)
        tokens_B = _take(order_BK, places_B)
    elif sampling.top_p < 1:
        tokens_B, logprobs_B = _draw_top_p(relative_BV / temperature, sampling.top_p, uniforms_B)
    else:
        tokens_B, logprobs_B = _draw(relative_BV if temperature == 1 else relative_BV / temperature, uniforms_B)
    if not sampler_logprobs and (sampling.cuts or temperature != 1):
        logprobs_B = _take(relative_BV, tokens_B) - relative_BV.exp_().sum(-1).log()
    return tokens_B, logprobs_B.float()


def _draw(scaled_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, of the whole vocabulary; `scaled_BV` are logits up to a constant."""
    weights_BV = scaled_BV.exp()
    vocabulary = weights_BV.shape[1]
    whole = vocabulary - vocabulary % _BLOCK
    parts = [weights_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1), weights_BV[:, whole:].sum(-1, keepdim=True)]
    sums_BN = torch.cat(parts, dim=1).double()
    ends_BN = sums_BN.cumsum(-1)
    total_B = ends_BN[:, -1]
    targets_B = uniforms_B * total_B
    blocks_B = _pass(ends_BN, sums_BN, targets_B)
    # The last block may be short: its last token is repeated, beyond all targets.
    ids_BW = (blocks_B.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)).clamp_(
        max=vocabulary - 1
    )
    weights_BW = weights_BV.gather(1, ids_BW).double()
    before_B = _take(ends_BN, blocks_B) - _take(sums_BN, blocks_B)
    tokens_B = _take(ids_BW, _pass(weights_BW.cumsum(-1), weights_BW, targets_B - before_B))
    return tokens_B, _take(scaled_BV, tokens_B) - total_B.log()


def _draw_top_p(scaled_BV: Tensor, top_p: float, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, of the likeliest tokens that make up `top_p`; sorts as few of them as will do."""
    limit_B = top_p * scaled_BV.exp().sum(-1).double()
    tokens_B, logprobs_B = torch.zeros_like(limit_B, dtype=torch.int64), torch.zeros_like(limit_B)
    open_B, count = torch.arange(len(limit_B), device=limit_B.device), _FIRST_CUT
    while len(open_B):
        count = min(count, scaled_BV.shape[1])
        open_BV = scaled_BV if len(open_B) == len(scaled_BV) else scaled_BV[open_B]  # at first: no copy
        values_BK, order_BK = open_BV.topk(count)
        weights_BK = values_BK.double().exp()
        places_B, logprobs_B[open_B] = _draw_nucleus(weights_BK, limit_B[open_B], uniforms_B[open_B])
        tokens_B[open_B] = _take(order_BK, places_B)
        enough_B = weights_BK.sum(-1) >= limit_B[open_B]
        open_B = open_B[~enough_B] if count < scaled_BV.shape[1] else open_B[:0]
        count *= 4
    return tokens_B, logprobs_B


def _draw_nucleus(weights_BK: Tensor, limit_B: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Places and log-probabilities of falling weights: those after a sum of `limit_B` are left out, never the first."""
    before_BK = weights_BK.cumsum(-1) - weights_BK
    kept_BK = weights_BK.where(before_BK < limit_B.unsqueeze(1), 0.0)
    ends_BK = kept_BK.cumsum(-1)
    total_B = ends_BK[:, -1]
    places_B = _pass(ends_BK, kept_BK, uniforms_B * total_B)
    return places_B, (_take(kept_BK, places_B) / total_B).log()


def _pass(ends_BX: Tensor, weights_BX: Tensor, targets_B: Tensor) -> Tensor:
    """The places, int64 [B], at which the cumulative sums `ends_BX` of the weights pass the targets.

    Rounding may carry a target to the end, where tokens without any probability can stand: never one of those.
    """
    places_B1 = torch.searchsorted(ends_BX, targets_B.unsqueeze(1), right=True)
    last_B1 = weights_BX.shape[1] - 1 - (weights_BX > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return places_B1.minimum(last_B1).squeeze(1)


def _take(values_BX: Tensor, places_B: Tensor) -> Tensor:
    return values_BX.gather(1, places_B.unsqueeze(1)).squeeze(1)
