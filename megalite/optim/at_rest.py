"""Whether the optimizer's shards are still what the last update wrote.

Under ZeRO a master weight and its optimizer state exist once, so no replica can tell that one of their bits has
flipped in memory. Between two updates nothing writes to them: the sum of their bits after an update must be their sum
before the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalite.optim.shard import Segment

WEIGHT = "weight"


class StateSums:
    """Sums of the master weights and states of some segments. Cost: two reads of 12 bytes a parameter with AdamW."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._sums: Tensor | None = None

    def _tensors(self) -> Iterator[tuple[Segment, str, Tensor]]:
        for segment in self._segments:
            yield segment, WEIGHT, segment.master.detach()
            for kind, tensor in sorted(segment.state.items()):
                yield segment, kind, tensor

    def _now(self) -> Tensor:
        """int64 [tensors]."""
        return torch.stack([bit_sum(tensor) for _, _, tensor in self._tensors()])

    def remember(self) -> None:
        """Take the sums; called when an update has been written."""
        if self._segments:
            self._sums = self._now()

    def forget(self) -> None:
        """Called when something else than an update has written, such as a load."""
        self._sums = None

    def changed(self) -> Tensor | float:
        """The number of tensors whose sum is another than after the last update: fp64 scalar on their device."""
        return 0.0 if self._sums is None else (self._now() != self._sums).sum().double()

    def names(self) -> list[str]:
        """Of each tensor that has changed: its kind, and the global tensors it holds parts of."""
        if self._sums is None:
            return []
        changed = zip(self._tensors(), (self._now() != self._sums).tolist(), strict=True)
        return [f"{kind} of {_parts(segment)}" for (segment, kind, _), yes in changed if yes]


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a flat tensor's 8-byte words modulo 2^64, int64 scalar: one flipped bit always changes it, and the
    order of summation never does. The tensor's length must be a multiple of 8 bytes, as every segment's is."""
    return tensor.view(torch.int64).sum()


def _parts(segment: Segment) -> str:
    names = list(dict.fromkeys(box.name for box, _ in segment.pieces()))
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
