"""Loss spikes: seeing them, and which data to leave out after going back.

The recipe is PaLM's (Chowdhery et al. 2022, section 5.1), hands-free: return to a checkpoint some way before the spike
and leave out the batches around it. Data is left out by moving the global sample number forward; the learning rate
follows the step and does not notice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

WINDOW = 64
"""Accepted losses that are looked back on."""
MINIMUM = 16
"""Fewer losses than this say nothing about what is usual."""
_NORMAL_MAD = 1.4826
"""Median absolute deviation of a normal distribution, as a fraction of its standard deviation, inverted."""
_LEAST_DEVIATION = 0.005
"""Of the median: very even losses must not make a ripple a spike."""


class SpikeDetector:
    """Compares a loss with the recent accepted ones, by median and median absolute deviation (robust to outliers).

    `losses` (newest last) is its whole state and travels with checkpoints.
    """

    def __init__(self, threshold: float, losses: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.losses = list(losses)[-WINDOW:]

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is more than `threshold` robust deviations above the recent ones; if not, it is accepted."""
        if self.threshold > 0 and len(self.losses) >= MINIMUM:
            centre = statistics.median(self.losses)
            spread = _NORMAL_MAD * statistics.median(abs(other - centre) for other in self.losses)
            if loss > centre + self.threshold * max(spread, _LEAST_DEVIATION * abs(centre)):
                return True
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-WINDOW:]
        return False


def skip_range(spike_sample: int, batch: int, skip_steps: int, not_before: int) -> tuple[int, int]:
    """Samples [first, stop) to leave out: `skip_steps` batches around the one that begins at `spike_sample`.

    The range begins no earlier than `not_before` (where the checkpoint stands) and always covers the spike's batch.
    """
    first = max(not_before, spike_sample - skip_steps // 2 * batch)
    return first, max(first + skip_steps * batch, spike_sample + batch)


def next_sample(sample: int, skips: Iterable[tuple[int, int]]) -> int:
    """Where to read on when the data position has come to `sample`: past every range to leave out that it lies in."""
    for first, stop in sorted(skips):
        if first <= sample < stop:
            sample = stop
    return sample
