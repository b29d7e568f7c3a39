"""What one rank updates, saves and loads of a bucket: master weights, gradients and the optimizer's named state."""

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
    """The run of a bucket's elements that this rank updates; 1-D tensors of one length.

    `master` are the weights in fp32: the bucket's parameters themselves where they are fp32, else a copy. `state` is
    what the optimizer keeps, by name. A frozen bucket has its parameters as `master`, in their own dtype, no gradient
    and no state.
    """

    bucket: Bucket
    master: torch.nn.Parameter
    gradient: Tensor | None
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def span(self) -> slice:
        """The segment's elements of the bucket."""
        return self.bucket.updated

    @property
    def separate_master(self) -> bool:
        return self.master.dtype != self.bucket.dtype

    def write_back(self) -> None:
        """Round the master weights into the parameters, where they are a copy."""
        if self.separate_master:
            self.bucket.owned.copy_(self.master.detach())

    def take_parameters(self) -> None:
        """The parameters as they are become the master weights, where those are a copy."""
        if self.separate_master:
            self.master.data.copy_(self.bucket.owned)

    def pieces(self) -> Iterator[tuple[Box, slice]]:
        """What this segment holds of the global tensors: (box, where its elements lie in the segment), row-major.

        Boxes of which another replica is the owner are included: every holder needs them when loading.
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
