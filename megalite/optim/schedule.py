"""Learning rate as a pure function of the step (never of the position in the data)."""

from __future__ import annotations

import math

from megalite.config import OptimizerConfig

WSD_DECAY = 0.2
"""The share of the steps over which `wsd` (warm-up, stable, decay; Hu et al. 2024) comes down."""


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate for update number `step` (from 1) of `steps`: linear warm-up to `lr`, then `schedule` down to `min_lr`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    span = config.lr - config.min_lr
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "linear":
        return config.lr - span * progress
    if config.schedule == "cosine":
        return config.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_steps = max(1, round(WSD_DECAY * steps))
    return config.lr - span * min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
