"""The part of a bucket that one rank updates, saves and loads: master weights, gradients and named optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalite.parallel.buckets import Bucket
from megalite.parallel.zero import StageBuckets
from megalite.placement import Box, range_boxes


@dataclass(frozen=True, eq=False)
class Segment:
    """The contiguous elements of a bucket that this rank updates; 1-D tensors of equal length.

    `master` are the fp32 weights: the bucket's parameters themselves if those are fp32, else a copy. `state` is the
    optimizer's, by name. For a frozen bucket, `master` are its parameters in their own dtype, without gradient or
    state.
    """

    bucket: Bucket
    master: torch.nn.Parameter
    gradient: Tensor | None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def span(self) -> slice:
        """The segment's range of elements in the bucket."""
        return self.bucket.updated

    @property
    def separate_master(self) -> bool:
        return self.master.dtype != self.bucket.dtype

    def write_back(self) -> None:
        """Round the master weights into the parameters, if they are a copy."""
        if self.separate_master:
            self.bucket.owned.copy_(self.master.detach())

    def take_parameters(self) -> None:
        """Copy the parameters into the master weights, if those are a copy."""
        if self.separate_master:
            self.master.data.copy_(self.bucket.owned)

    def pieces(self) -> Iterator[tuple[Box, slice]]:
        """The boxes of global tensors in this segment: (box, range of its elements in the segment), row-major.

        Boxes owned by another replica are included: every holder needs them when loading.
        """
        for slot in self.bucket.slots:
            start, stop = max(slot.start, self.span.start), min(slot.stop, self.span.stop)
            if start >= stop:
                continue
            shape = tuple(slot.parameter.shape)
            for box in slot.parameter.placement.boxes:
                for part, first in range_boxes(box, shape, start - slot.start, stop - slot.start):
                    begin = slot.start + first - self.span.start
                    yield part, slice(begin, begin + math.prod(part.size))


def segments_of(stages: Iterable[StageBuckets]) -> list[Segment]:
    """A segment for every bucket of some stages, in the order of the buckets."""
    return [_segment(bucket) for stage in stages for bucket in stage.buckets]


def _segment(bucket: Bucket) -> Segment:
    values = bucket.owned
    if not bucket.trained:
        return Segment(bucket, torch.nn.Parameter(values, requires_grad=False), None)
    master = torch.nn.Parameter(values if values.dtype == torch.float32 else values.float())
    return Segment(bucket, master, bucket.updated_gradients)
