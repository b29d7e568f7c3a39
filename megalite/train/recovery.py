"""Loss spikes: seeing them, and which data to leave out after going back.

The recipe is PaLM's (Chowdhery et al. 2022, section 5.1), hands-free: return to a checkpoint some way before the spike
and leave out the batches around it. Data is left out by moving the global sample number forward; the learning rate
follows the step and does not notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

WINDOW = 256
"""Losses that are looked back on."""
MINIMUM = 48
"""Fewer losses than this say nothing about what is usual."""
_LEVEL = 15
"""Latest losses whose median is the level: it follows a loss that falls, or that rises after a warm restart."""
_RECENT = 128
"""Losses that tell the usual deviation: noise changes with the batch and the learning rate."""
_NORMAL_MAD = 1.4826
"""Median absolute deviation of a normal distribution, as a fraction of its standard deviation, inverted."""
_LEAST_DEVIATION = 0.005
"""Of the level, or of one nat where the level is lower: very even losses must not make a ripple a spike."""
_TAILS = ((2, 0.0, 1.5), (3, 1 / 64, 1.25))
"""(losses in a row, share of the window's largest excesses to pass over, factor): each of the losses in a row must
exceed so many times the largest excess that is left."""
_RISE = 1.05
"""A learning rate that rises faster than this from one step to the next makes the earlier losses no measure."""


class SpikeDetector:
    """Finds a loss that has gone up and stays up.

    A loss is measured by its excess over the level: the median of the latest ones, and how far losses lately were from
    it, so that a steady fall or rise is expected. The excess must be `threshold` robust standard deviations (by the
    median absolute deviation), and stand out of the largest excesses in the window, three times in a row; or further
    out, twice. The second condition needs no assumption on the distribution: with tiny batches or a mixture of sources,
    losses far from the median are ordinary, but not three in a row beyond all but the largest 1.6 % (probability 4e-6
    where they are independent). A single high loss cannot be told from a rare hard sample, and is gone with the next
    step if it did no harm.

    `losses` (newest last) and `lr` are its whole state and travel with checkpoints.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = (), lr: float = 0.0) -> None:
        self.threshold, self.lr = threshold, lr
        self.losses = list(losses)[-WINDOW:]

    def spike_steps(self, loss: float, lr: float) -> int:
        """How many steps a spike has lasted that shows with `loss`, the newest, made at learning rate `lr`; 0: none.

        A loss that is no spike is taken into the window.
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
        """Whether the last `steps` losses are a spike by the losses before them."""
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
    """Samples [first, stop) to leave out: `skip_steps` batches around the one that begins at `spike_sample`.

    The range begins no earlier than `not_before` (where the checkpoint stands) and always covers the spike: its first
    batch, and what was read up to `stop`.
    """
    first = max(not_before, spike_sample - skip_steps // 2 * batch)
    return first, max(first + skip_steps * batch, spike_sample + batch, stop or 0)


def next_sample(sample: int, skips: Iterable[tuple[int, int]]) -> int:
    """Where to read on when the data position has come to `sample`: past every range to leave out that it lies in."""
    for first, stop in sorted(skips):
        if first <= sample < stop:
            sample = stop
    return sample


def unearned(rolled_back_at: Iterable[int], step: int, rollback_steps: int) -> list[int]:
    """Of the steps at which the run went back, those that still count against `recovery.max_rollbacks` at `step`.

    A rollback is earned back when the run has come ten times as far beyond it as it went back, at least 100 steps.
    """
    return [other for other in rolled_back_at if step <= other + max(100, 10 * rollback_steps)]
