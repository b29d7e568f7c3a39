"""Objectives of PPO and GRPO: the clipped policy loss and the clipped value loss, one answer a row.

A label that counts is an action: a token of the answer. Columns, fp32 [B, S], at the actions: `old` (log-probability
under the policy that gave the answer), `advantages`, `reference` (log-probability under the reference), `values` and
`returns` (of the critic). B micro-batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.objective import Outputs, Reads


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate at each sampled token of KL(policy || reference), in nats (Schulman 2020, joschu.net/blog/kl-approx).

    With d = log policy - log reference: `k1` is d, `k2` is d^2 / 2, `k3` is exp(-d) - 1 + d. As part of a loss, the
    gradient of k1 is zero in expectation, that of k2 is the gradient of KL(policy || reference), and that of k3 the
    gradient of KL(reference || policy).
    """
    d = logprobs - reference
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1(-d) + d


@dataclass(frozen=True)
class ClippedPolicy:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip_high)) with r = policy / old (Schulman et al. 2017, arXiv:1707.06347).

    `kl` weighs the estimate of the divergence from the reference (GRPO: Shao et al. 2024, arXiv:2402.03300).
    `loss_over` "token" is a mean over all actions of the global batch, "sequence" a mean over answers of each one's
    mean. `temperature` is that of sampling.
    """

    clip: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    kl_estimator: str = "k3"
    loss_over: str = "token"
    temperature: float = 1.0

    @property
    def reads(self) -> Reads:
        return "logprobs"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("clip_fraction", "ratio_deviation", "approx_kl")

    @classmethod
    def from_config(cls, config: Config) -> ClippedPolicy:
        policy = config.policy
        kl = policy.kl if policy.kl_in == "loss" else 0.0
        return cls(policy.clip, policy.clip_high, kl, policy.kl_estimator, policy.loss_over, config.rollout.temperature)

    def units(self, batch: Batch) -> Tensor:
        actions_BS = batch.labels_BS != IGNORE_INDEX
        return actions_BS.sum() if self.loss_over == "token" else actions_BS.any(1).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.logprobs_BS is not None
        weight_BS = (batch.labels_BS != IGNORE_INDEX).double() * scale
        if self.loss_over == "sequence":
            weight_BS = weight_BS / (batch.labels_BS != IGNORE_INDEX).sum(1, keepdim=True).clamp(min=1)
        logprobs_BS, advantages_BS = outputs.logprobs_BS.double(), batch.columns["advantages"].double()
        change_BS = logprobs_BS - batch.columns["old"].double()
        ratio_BS = change_BS.exp()
        plain_BS = -advantages_BS * ratio_BS
        clipped_BS = -advantages_BS * ratio_BS.clamp(1 - self.clip, 1 + self.clip_high)
        token_BS = torch.maximum(plain_BS, clipped_BS)
        if self.kl:
            reference_BS = batch.columns["reference"].double()
            token_BS = token_BS + self.kl * kl_estimate(logprobs_BS, reference_BS, self.kl_estimator)
        metrics_BS = {
            "clip_fraction": (clipped_BS > plain_BS).double(),
            "ratio_deviation": (ratio_BS - 1).abs(),
            "approx_kl": change_BS.square() / 2,
        }
        loss = (token_BS * weight_BS).sum()
        return loss, {name: (each_BS.detach() * weight_BS).sum() for name, each_BS in metrics_BS.items()}


@dataclass(frozen=True)
class ClippedValue:
    """Half the larger of (V - R)^2 and (V' - R)^2, where V' is V kept within `clip` of the old value (0: (V - R)^2
    alone); a mean over all actions of the global batch."""

    clip: float = 0.2

    @property
    def reads(self) -> Reads:
        return "values"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ()

    def units(self, batch: Batch) -> Tensor:
        return (batch.labels_BS != IGNORE_INDEX).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.values_BS is not None
        actions_BS, values_BS = batch.labels_BS != IGNORE_INDEX, outputs.values_BS.double()
        old_BS, returns_BS = batch.columns["values"].double(), batch.columns["returns"].double()
        error_BS = (values_BS - returns_BS).square()
        if self.clip:
            near_BS = old_BS + (values_BS - old_BS).clamp(-self.clip, self.clip)
            error_BS = torch.maximum(error_BS, (near_BS - returns_BS).square())
        return (0.5 * error_BS * actions_BS).sum() * scale, {}
