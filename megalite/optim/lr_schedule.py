"""Learning rate as a pure function of the step (never of the position in the data)."""

from __future__ import annotations

import math

from megalite.config import Config


def learning_rate(step: int, config: Config) -> float:
    """The rate of update number `step` (from 1): linear warm-up to `lr`, then `optimizer.schedule` down to `min_lr`.

    `wsd` (warm-up, stable, decay; Hu et al. 2024) holds `lr` and decays linearly over the last `decay_steps`.
    """
    optimizer, steps = config.optimizer, config.train.steps
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    span = optimizer.lr - optimizer.min_lr
    if optimizer.schedule == "wsd":
        done = (step - (steps - config.decay_steps)) / max(1, config.decay_steps)
        return optimizer.lr - span * min(1.0, max(0.0, done))
    progress = min(1.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    if optimizer.schedule == "linear":
        return optimizer.lr - span * progress
    return optimizer.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * progress))
