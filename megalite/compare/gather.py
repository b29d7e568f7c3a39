"""Global tensors out of the pieces of all ranks."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megalite.compare.pieces import Piece, Port

Key = tuple[int, str, str]
"""Step, kind, name."""


@dataclasses.dataclass
class Tensor:
    """A recorded tensor, or the sample of it that was kept: `whole` with its pieces.

    `covered` is False where no piece holds an element. `bits` are those of the whole tensor, None without hashes.
    """

    port: Port
    pieces: list[Piece]
    whole: np.ndarray
    covered: np.ndarray
    bits: int | None

    def box(self, piece: Piece) -> np.ndarray:
        """A piece's elements of this tensor."""
        return self.whole[_slices(piece)]


def by_name(pieces: Iterable[Piece]) -> dict[Key, list[Piece]]:
    """The pieces of each tensor."""
    groups: defaultdict[Key, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.port.key].append(piece)
    return dict(groups)


def gather(pieces: Sequence[Piece]) -> Tensor:
    """The tensor of these pieces: terms are added up, and of replicas the first counts."""
    pieces = _summed(pieces)
    extent = _extent(pieces)
    dtype = np.result_type(*{piece.values.dtype for piece in pieces})
    whole, covered = np.zeros(extent, dtype=dtype), np.zeros(extent, dtype=bool)
    for piece in reversed(pieces):  # the first is written last
        whole[_slices(piece)] = piece.values
        covered[_slices(piece)] = True
    distinct = {(piece.offset, piece.size): piece.bits for piece in pieces}
    bits = None
    if all(value is not None for value in distinct.values()):
        bits = sum(value for value in distinct.values() if value is not None) % 2**64
    return Tensor(pieces[0].port, pieces, whole, covered, bits)


def _summed(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, with the terms of each box in one."""
    whole = [piece for piece in pieces if not piece.partial]
    terms: defaultdict[tuple[tuple[int, ...], ...], list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.partial:
            terms[piece.offset, piece.size].append(piece)
    for parts in terms.values():
        values = np.sum([part.values for part in parts], axis=0)
        whole.append(dataclasses.replace(parts[0], values=values, partial=False))
    return whole


def _extent(pieces: Sequence[Piece]) -> tuple[int, ...]:
    ends = [[start + length for start, length in zip(piece.corner, piece.values.shape)] for piece in pieces]
    return tuple(int(max(column)) for column in zip(*ends))


def _slices(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(piece.corner, piece.values.shape))


def ports(tensors: Mapping[Key, Sequence[Piece]]) -> list[Key]:
    """The keys in the order of execution."""
    return sorted(tensors, key=lambda key: (key[0], *tensors[key][0].port.turn))
