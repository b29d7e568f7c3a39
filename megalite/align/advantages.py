"""Rewards, advantages and returns at the tokens of answers: float64 functions of whole steps, on the host.

Every rank of the last stage computes them for all answers of the step from the same numbers, so they do not depend on
the layout. R answers, S sequence; `mask_RS` is 1 at the actions (the tokens of an answer, contiguous in each row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.objective.policy import kl_estimate

WHITENING_EPS, GROUP_EPS = 1e-8, 1e-4
_KL_STEP = 0.2


def token_rewards(
    logprobs_RS: Tensor, reference_RS: Tensor, scores_R: Tensor, mask_RS: Tensor, kl: float, estimator: str = "k1"
) -> Tensor:
    """[R, S]: -kl times the estimated divergence at every action, and the score on the last one."""
    rewards_RS = -kl * kl_estimate(logprobs_RS, reference_RS, estimator) * mask_RS
    steps_S = torch.arange(mask_RS.shape[1], device=mask_RS.device)
    last_R1 = (steps_S * (mask_RS > 0)).amax(1, keepdim=True)
    return rewards_RS.scatter_add(1, last_R1, (scores_R * (mask_RS > 0).any(1)).to(rewards_RS.dtype).unsqueeze(1))


def generalised_advantages(
    values_RS: Tensor, rewards_RS: Tensor, mask_RS: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [R, S] each (Schulman et al. 2016, arXiv:1506.02438).

    delta = r + gamma V' - V and A = delta + gamma lam A', where V' and A' are those of the next action, 0 after the
    last; returns are A + V.
    """
    values_RS, rewards_RS = values_RS * mask_RS, rewards_RS * mask_RS
    advantages_RS = torch.zeros_like(values_RS)
    next_advantage_R = next_value_R = torch.zeros_like(values_RS[:, 0])
    for at in reversed(range(values_RS.shape[1])):
        delta_R = rewards_RS[:, at] + gamma * next_value_R - values_RS[:, at]
        next_advantage_R = (delta_R + gamma * lam * next_advantage_R) * mask_RS[:, at]
        next_value_R = values_RS[:, at]
        advantages_RS[:, at] = next_advantage_R
    return advantages_RS, advantages_RS + values_RS


def whiten(x_RS: Tensor, mask_RS: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance over all actions, 0 elsewhere."""
    count = mask_RS.sum()
    mean = (x_RS * mask_RS).sum() / count.clamp(min=1)
    variance = ((x_RS - mean).square() * mask_RS).sum() / (count - 1).clamp(min=1)
    return (x_RS - mean) / (variance + WHITENING_EPS).sqrt() * mask_RS


def group_advantages(scores_PA: Tensor, normalise: str) -> Tensor:
    """[P prompts, A answers]: each score less its prompt's mean; `std` divides by their deviation plus 1e-4 (GRPO),
    `none` does not (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)."""
    centred_PA = scores_PA - scores_PA.mean(1, keepdim=True)
    if normalise == "none":
        return centred_PA
    return centred_PA / (scores_PA.std(1, keepdim=True) + GROUP_EPS)


def adapted_kl(weight: float, divergence: float, target: float, answers: int, horizon: float) -> float:
    """The next weight of the divergence: it grows by up to a fifth every `horizon` answers while the divergence is
    above its target, and shrinks below it (Ziegler et al. 2019, arXiv:1909.08593)."""
    error = min(max(divergence / target - 1, -_KL_STEP), _KL_STEP)
    return weight * (1 + error * answers / horizon)
