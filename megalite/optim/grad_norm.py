"""The global gradient norm: every element of the model counted once, in every layout.

Squares are summed in float64 and rounded once at the end, so that layouts with the same gradients clip by the same
coefficient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels import Kernels
from megalite.parallel.buckets import Bucket
from megalite.parallel.zero import StageBuckets
from megalite.placement import flat_ranges


class GradientNorm:
    """This rank's part of the squared norm: the boxes it owns, within its gradient shards."""

    def __init__(self, stages: list[StageBuckets], rank: int, kernels: Kernels) -> None:
        self._square_sum = kernels.square_sum
        self._owned = [view for stage in stages for bucket in stage.trained for view in _owned_gradients(bucket, rank)]
        self._zero = torch.zeros((), dtype=torch.float64, device=stages[0].buckets[0].device)

    def local_square_sum(self) -> Tensor:
        """fp64 scalar; the sum over all ranks is the squared global norm."""
        total = self._zero.clone()
        for gradient in self._owned:
            total += self._square_sum(gradient)
        return total


def _owned_gradients(bucket: Bucket, rank: int) -> list[Tensor]:
    """Views of this rank's shard of the reduced gradients, without boxes that are counted by another replica."""
    ranges: list[tuple[int, int]] = []
    for slot in bucket.slots:
        for box in slot.parameter.placement.boxes:
            if box.owner != rank:
                continue
            for start, stop in flat_ranges(box, tuple(slot.parameter.shape)):
                start, stop = max(slot.start + start, bucket.shard.start), min(slot.start + stop, bucket.shard.stop)
                if start >= stop:
                    continue
                if ranges and ranges[-1][1] == start:
                    start = ranges.pop()[0]
                ranges.append((start, stop))
    origin = bucket.shard.start
    return [bucket.shard_gradients[start - origin : stop - origin] for start, stop in ranges]
