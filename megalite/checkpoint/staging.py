"""One rank's share of a checkpoint: pieces of the master weights and optimizer state, staged in host memory.

Every element of every global tensor is written by exactly one rank: among the replicas within the model, the owner of
its box; among the data-parallel ranks, the one whose shard of the bucket contains it (even without ZeRO, so that all
ranks write).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.checkpoint.manifest import WEIGHT, piece_key
from megalite.checkpoint.state import Checkpointable
from megalite.optim.shard import Segment
from megalite.placement import Box, range_boxes

_PIECE_BYTES = 64 << 20
"""Larger pieces are split by rows: loading any part of a piece reads and verifies all of it."""


@dataclass(frozen=True)
class Part:
    """A range of a segment's elements that this rank writes: `window` in the segment, and `pieces` of global tensors
    with the range of their elements in the window."""

    segment: Segment
    window: slice
    pieces: tuple[tuple[Box, slice], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The master weights, and what the optimizer keeps."""
        return (WEIGHT, *self.segment.state)

    def tensor(self, kind: str) -> Tensor:
        """The elements [window] of one kind, on the training device; fp32 except for frozen weights."""
        whole = self.segment.master.detach() if kind == WEIGHT else self.segment.state[kind]
        return whole[self.window]


def _cut(piece: Box, position: int, start: int, stop: int) -> Iterator[tuple[Box, slice]]:
    """Elements [start, stop) of a contiguous piece at `position`, as (box, range)."""
    alone = dataclasses.replace(piece, local_offset=(0,) * len(piece.size))
    for part, begin in range_boxes(alone, piece.size, start, stop):
        yield part, slice(position + begin, position + begin + math.prod(part.size))


def _cut_rows(piece: Box, where: slice) -> Iterator[tuple[Box, slice]]:
    """The piece in blocks of whole rows of at most `_PIECE_BYTES` (or one row)."""
    count = math.prod(piece.size)
    row = count // piece.size[0]
    rows = max(1, _PIECE_BYTES // (4 * row))
    for first in range(0, piece.size[0], rows):
        yield from _cut(piece, where.start, first * row, min(count, (first + rows) * row))


def rank_parts(trainer: Checkpointable) -> list[Part]:
    """The parts of the trainer's state that this rank writes."""
    parts = []
    for segment in trainer.saved_segments:
        shard, span = segment.bucket.shard, segment.span
        window = slice(max(shard.start, span.start) - span.start, min(shard.stop, span.stop) - span.start)
        if window.start >= window.stop:
            continue
        pieces = []
        for box, where in segment.pieces():
            if box.owner == trainer.mesh.rank:
                pieces += list(_within(box, where, window))
        if pieces:
            parts.append(Part(segment, window, tuple(pieces)))
    return parts


def _within(box: Box, where: slice, window: slice) -> Iterator[tuple[Box, slice]]:
    """The part of a piece inside the window, as (box, range in the window)."""
    start, stop = max(where.start, window.start), min(where.stop, window.stop)
    if start < stop:
        for part, place in _cut(box, where.start - window.start, start - where.start, stop - where.start):
            yield from _cut_rows(part, place)


class Staging:
    """Host memory for one rank's part of a checkpoint, allocated once and used for every save."""

    def __init__(self, trainer: Checkpointable) -> None:
        self.trainer, self.parts = trainer, rank_parts(trainer)
        self._cuda = trainer.mesh.device.type == "cuda"
        self._buffers: list[dict[str, Tensor]] = []

    def snapshot(self, *, copy: bool) -> list[dict[str, Tensor]]:
        """The tensors of each part, by kind, on the host. Without `copy`, CPU tensors alias the trainer's."""
        self.trainer.wait_for_all_gather()
        if not copy and not self._cuda:
            return [{kind: part.tensor(kind).float() for kind in part.kinds} for part in self.parts]
        if not self._buffers:
            self._buffers = [
                {kind: torch.empty(part.tensor(kind).shape, pin_memory=self._cuda) for kind in part.kinds}
                for part in self.parts
            ]
        for part, buffers in zip(self.parts, self._buffers):
            for kind, buffer in buffers.items():
                buffer.copy_(part.tensor(kind), non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize()
        return self._buffers

    def tensors(self, snapshot: list[dict[str, Tensor]]) -> Iterator[tuple[str, Box, str, Tensor]]:
        """(kind, box, key, values) of every piece, in memory order."""
        for part, by_kind in zip(self.parts, snapshot):
            for kind, values in by_kind.items():
                for box, where in part.pieces:
                    yield kind, box, piece_key(kind, box.name, box.offset), values[where].view(box.size)
