"""Loss spikes: how they are detected, and which data to skip after a rollback.

This automates PaLM's recipe (Chowdhery et al. 2022, section 5.1): return to a checkpoint some way before the spike and
skip the batches around it. Data is skipped by advancing the global sample number; the learning rate depends on the step
alone and is unaffected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

WINDOW = 256
"""Number of past losses considered."""
MINIMUM = 48
"""With fewer losses than this, nothing counts as a spike."""
_LEVEL = 15
"""Latest losses whose median is the level: short enough to follow a falling loss, or a rise after a warm restart."""
_RECENT = 128
"""Losses used to estimate the usual deviation: noise changes with the batch and the learning rate."""
_NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution, as a multiple of its median absolute deviation."""
_LEAST_DEVIATION = 0.005
"""Least deviation, relative to the level (at least one nat): with very smooth losses, a ripple is not a spike."""
_TAILS = ((2, 0.0, 1.5), (3, 1 / 64, 1.25))
"""(consecutive losses, share of the window's largest excesses to ignore, factor): each of the consecutive losses must
exceed `factor` times the largest remaining excess."""
_RISE = 1.05
"""If the learning rate rises faster than this from one step to the next, the window is cleared."""


class SpikeDetector:
    """Detects a loss that has gone up and stays up.

    A loss is measured by its excess over the level, the median of the latest losses; the median of recent excesses is
    subtracted, so that a steady fall or rise is not a spike. The excess must be `threshold` robust standard deviations
    (from the median absolute deviation) and exceed the largest excesses in the window, three times in a row; or, by a
    larger factor, twice. The second condition assumes nothing about the distribution: with tiny batches or mixed
    sources, losses far from the median are ordinary, but not three in a row beyond all but the largest 1.6 %
    (probability 4e-6 if independent). A single high loss cannot be distinguished from a rare hard sample, and is gone
    at the next step if it did no harm.

    `losses` (newest last) and `lr` are its whole state and are saved with checkpoints.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = (), lr: float = 0.0) -> None:
        self.threshold, self.lr = threshold, lr
        self.losses = list(losses)[-WINDOW:]

    def spike_steps(self, loss: float, lr: float) -> int:
        """The number of steps, up to this one with `loss` at learning rate `lr`, that form a spike; 0 for none.

        A loss that is not a spike enters the window.
        """
        if not math.isfinite(loss):
            return 0
        if lr > _RISE * self.lr:
            self.losses = []
        self.lr = lr
        for steps, passed_over, factor in _TAILS if self.threshold > 0 else ():
            if self._stands_out([*self.losses, loss], steps, passed_over, factor):
                return steps
        self.losses = [*self.losses, loss][-WINDOW:]
        return 0

    def _stands_out(self, losses: list[float], steps: int, passed_over: float, factor: float) -> bool:
        """Whether the last `steps` losses are a spike relative to those before them."""
        before, lowest = np.asarray(losses[:-steps]), min(losses[-steps:])
        if len(before) < MINIMUM:
            return False
        level = float(np.median(before[-_LEVEL:]))
        least = self.threshold * _LEAST_DEVIATION * max(1.0, abs(level))
        if lowest <= level + least:
            return False
        levels = np.median(np.lib.stride_tricks.sliding_window_view(before, _LEVEL), axis=1)
        excess = before[_LEVEL:] - levels[:-1]
        recent = excess[-_RECENT:]
        drift = float(np.median(recent))
        deviation = _NORMAL_MAD * float(np.median(np.abs(recent - drift)))
        largest = float(np.sort(excess)[-1 - int(passed_over * len(excess))])
        return lowest > level + max(least, drift + self.threshold * deviation, factor * largest)


def skip_range(
    spike_sample: int, batch: int, skip_steps: int, not_before: int, stop: int | None = None
) -> tuple[int, int]:
    """Samples [first, stop) to skip: `skip_steps` batches around the one that begins at `spike_sample`.

    The range begins no earlier than `not_before` (the checkpoint's position) and always covers the spike: its first
    batch, and everything read up to `stop`.
    """
    first = max(not_before, spike_sample - skip_steps // 2 * batch)
    return first, max(first + skip_steps * batch, spike_sample + batch, stop or 0)


def next_sample(sample: int, skips: Iterable[tuple[int, int]]) -> int:
    """The next sample to read from position `sample` on: past any skipped range that contains it."""
    for first, stop in sorted(skips):
        if first <= sample < stop:
            sample = stop
    return sample


def unearned(rolled_back_at: Iterable[int], step: int, rollback_steps: int) -> list[int]:
    """The rollbacks, by step, that still count against `recovery.max_rollbacks` at `step`.

    A rollback is earned back once the run has gone ten times `rollback_steps`, and at least 100 steps, beyond it.
    """
    return [other for other in rolled_back_at if step <= other + max(100, 10 * rollback_steps)]
