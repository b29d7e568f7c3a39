"""The order of examples and their places in rows: pure functions of counts, lengths, seed and epoch.

An epoch takes each example once or, with weights, as many as all files have, by their shares. It is shuffled, then
packed: each example goes into the fullest of a few open rows that has room (best fit), so the order stays random, and
the rows are shuffled again, since the last ones are the emptiest. Any epoch can be computed alone.

Does not import torch.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalite.data.blend import build_blend

OPEN_ROWS = 256
"""Rows that may still take an example; with more of them rows get fuller and the order less random."""


def random_state(seed: int, what: str, epoch: int) -> np.random.RandomState:
    """A generator for one purpose; `RandomState`, because numpy keeps its results the same for ever."""
    digest = hashlib.sha256(f"{what} {seed} {epoch}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


class ExampleOrder:
    """The order of the examples of some files in every epoch.

    Args:
        counts: how many examples each file has; they are numbered through all files.
        weights: normalised shares of the files, or None to take every example once.
        seed: of the shuffles.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.counts, self.weights, self.seed = list(counts), weights, seed
        self.first = np.concatenate(([0], np.cumsum(self.counts)))
        self.total = int(self.first[-1])

    def members(self, epoch: int) -> np.ndarray:
        """Numbers of the examples of an epoch in its order, int64 [total]."""
        shuffle = random_state(self.seed, "order", epoch)
        if self.weights is None:
            return shuffle.permutation(self.total).astype(np.int64)
        taken = np.zeros(len(self.counts), np.int64)
        for _ in range(epoch + 1):
            blend = build_blend(self.weights, self.total, taken)
        files, drawn = blend["dataset_index"], blend["dataset_sample_index"]
        members = np.empty(self.total, np.int64)
        for file, count in enumerate(self.counts):
            places = np.flatnonzero(files == file)
            rounds, inner = np.divmod(drawn[places], count)
            for again in np.unique(rounds).tolist():
                order = random_state(self.seed, f"file {file}", again).permutation(count)
                here = rounds == again
                members[places[here]] = self.first[file] + order[inner[here]]
        return members[shuffle.permutation(self.total)]


@dataclass(frozen=True)
class Plan:
    """The rows of an epoch: row r holds the examples `members[starts[r] : starts[r + 1]]`, in this order; int64."""

    starts: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return self.starts.size - 1


def plan_rows(order: ExampleOrder, lengths: np.ndarray, room: int, epoch: int, packing: bool = True) -> Plan:
    """Pack an epoch of examples of `lengths` tokens (at most `room`) into rows of `room` tokens; without `packing` each
    has a row of its own."""
    members = order.members(epoch)
    if not packing:
        return Plan(np.arange(members.size + 1, dtype=np.int64), members)
    rows = best_fit(lengths[members].tolist(), room)
    shuffled = [rows[row] for row in random_state(order.seed, "rows", epoch).permutation(len(rows))]
    sizes = np.array([len(row) for row in shuffled], np.int64)
    places = np.fromiter((place for row in shuffled for place in row), np.int64, members.size)
    return Plan(np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes))), members[places])


def best_fit(lengths: Sequence[int], room: int, open_rows: int = OPEN_ROWS) -> list[list[int]]:
    """Rows of places in `lengths`: each goes, in turn, into the open row that it leaves the least room in, else into a
    new one. Of more than `open_rows` the fullest is closed."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, row) of the open rows, in order
    shortest = min(lengths, default=0)
    for place, length in enumerate(lengths):
        found = bisect.bisect_left(left, (length, -1))
        if found < len(left):
            free, row = left.pop(found)
            rows[row].append(place)
        else:
            free, row = room, len(rows)
            rows.append([place])
        if free - length >= shortest:
            bisect.insort(left, (free - length, row))
            if len(left) > open_rows:
                left.pop(0)
    return rows
