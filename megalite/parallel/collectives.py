"""The collectives at the two boundaries of a tensor-parallel region.

A tensor-parallel block begins where its input is made full on every rank and ends where the ranks' partial outputs are
summed. In backward the two swap roles, and the layers (`megalite.parallel.linear`) call the other one:

    sequence parallel     begin: all-gather along the sequence       end: reduce-scatter along the sequence
    not sequence parallel begin: nothing, gradient all-reduced       end: all-reduce, gradient passed on

Tensors are sequence first (S, ...), so both run on contiguous memory without a copy. Every function returns a new
tensor and leaves its argument unchanged, except that `sum_start` consumes its input.

A gather or sum along the sequence may run in pieces, each under the product of another one
(`megalite.parallel.overlap`). For every piece to be contiguous on both sides, the sequence is first cut into the pieces
and each of them over the ranks. With 2 pieces, 2 ranks and 8 rows, rank 0 has the rows 0 1 4 5, and rank 1 has 2 3 6 7.
Sources: Shoeybi et al. 2019 (Megatron-LM, section 3), Korthikanti et al. 2022 (sequence parallelism, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.mesh import DONE, Group, Work
from megalite.parallel.deferred import Deferred
from megalite.parallel.turns import Turns


class Piece(NamedTuple):
    """Rows of one piece: in a rank's part of the sequence, and in the whole."""

    part: slice
    whole: slice


@dataclass(frozen=True)
class AllOf:
    """Several communications as one."""

    works: Sequence[Work]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@dataclass(frozen=True)
class TensorRegion:
    """The tensor-parallel group, and whether activations outside the region are split along the sequence.

    `pieces` is the number of pieces in which gathers and sums along the sequence run; a sequence of fewer rows a rank
    has as many as rows. `keeps`: layers keep what they have gathered for backward. `turns` are
    those of two forward passes at once.
    """

    group: Group
    sequence: bool
    pieces: int = 1
    keeps: bool = False
    turns: Turns = field(repr=False, compare=False, default_factory=Turns)
    size: int = field(init=False)
    """Ranks of the group."""
    split: int = field(init=False)
    """Into how many parts the sequence dimension is cut outside the tensor-parallel blocks."""
    deferred: Deferred = field(init=False, repr=False, compare=False, default_factory=Deferred)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.group.size)
        object.__setattr__(self, "split", self.group.size if self.sequence else 1)
        if self.split == 1:
            object.__setattr__(self, "pieces", 1)

    def cut(self, rows: int) -> list[Piece]:
        """The pieces of a sequence of which each rank has `rows` rows; the first ones are longer by one where the
        number does not divide."""
        count = max(1, min(self.pieces, rows))
        ends = [rows * (number + 1) // count for number in range(count)]
        return [
            Piece(slice(start, end), slice(start * self.split, end * self.split))
            for start, end in zip([0, *ends], ends)
        ]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part [s, ...] of what all ranks have whole, [S, ...]."""
        if self.split == 1:
            return whole
        pieces = self.cut(whole.shape[0] // self.split)
        return torch.cat([whole[piece.whole].chunk(self.split)[self.group.index] for piece in pieces])

    def gather_pieces(self, tensor: Tensor) -> tuple[Tensor, list[tuple[Piece, Work]]]:
        """Start to all-gather `tensor` along the sequence: (the whole, its pieces, each valid after its wait)."""
        tensor, pieces = tensor.contiguous(), self.cut(tensor.shape[0])
        whole = tensor.new_empty((tensor.shape[0] * self.split, *tensor.shape[1:]))
        return whole, [(piece, self.group.all_gather(whole[piece.whole], tensor[piece.part])) for piece in pieces]

    def gather_start(self, tensor: Tensor) -> tuple[Tensor, Work]:
        """Start to all-gather `tensor` along the sequence; the result is valid after the wait."""
        if self.split == 1:
            return tensor, DONE
        whole, pieces = self.gather_pieces(tensor)
        return whole, AllOf([work for _, work in pieces])

    def scatter_start(self, part: Tensor, partial: Tensor) -> Work:
        """Start to sum one piece `partial` (consumed) over the group; each rank gets its `part` of it."""
        return self.group.reduce_scatter(part, partial)

    def sum_start(self, partial: Tensor) -> tuple[Tensor, Work]:
        """Start to sum `partial` (consumed) over the group; under sequence parallelism each rank gets its part."""
        if self.size == 1:
            return partial, DONE
        partial = partial.contiguous()
        if not self.sequence:
            return partial, self.group.all_reduce(partial)
        rows = partial.shape[0] // self.split
        total = partial.new_empty((rows, *partial.shape[1:]))
        works = [self.scatter_start(total[piece.part], partial[piece.whole]) for piece in self.cut(rows)]
        return total, AllOf(works)

    def gather(self, tensor: Tensor) -> Tensor:
        if self.split == 1:
            return tensor
        whole, work = self.gather_start(tensor)
        work.wait()
        return whole

    def sum(self, partial: Tensor) -> Tensor:
        if self.size == 1:
            return partial
        total, work = self.sum_start(partial)
        work.wait()
        return total


@torch.no_grad()
def all_gather_stacked(tensor: Tensor, group: Group) -> Tensor:
    """Every rank's `tensor`, stacked along a new first dimension: [size, *tensor.shape]."""
    stacked = tensor.new_empty((group.size, *tensor.shape))
    group.all_gather(stacked.view(-1), tensor.contiguous().view(-1)).wait()
    return stacked
