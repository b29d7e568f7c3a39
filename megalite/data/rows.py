"""What a micro-batch is filled from: rows by global number. Does not import torch.

S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

NO_ROW = np.empty(0, np.int64)


@dataclass(frozen=True)
class Row:
    """The arrays of one row, to be filled: int64 [S] each, columns fp32 [S].

    A label is negative where it does not count, and so is a token that is only padding. `positions_S` and `documents_S`
    are `NO_ROW` where nobody reads them.
    """

    tokens_S: np.ndarray
    labels_S: np.ndarray
    positions_S: np.ndarray = field(default_factory=lambda: NO_ROW)
    documents_S: np.ndarray = field(default_factory=lambda: NO_ROW)
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


class Rows(Protocol):
    """Rows by number: `TokenDataset`, `PackedExamples`, the windows of an evaluation.

    Attributes:
        seq_length: S.
        separate: whether the documents of a row must not see each other, whatever the recipe says.
        columns: names of the further per-token numbers.

    `len(rows)` is the planned number; any number from 0 on can be read, by several threads.
    """

    seq_length: int
    separate: bool
    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def fill(self, number: int, row: Row) -> None:
        """Write row `number` into the arrays of `row`, all of each."""
        ...


Read = Callable[[int, np.ndarray, np.ndarray, np.ndarray], object]


def fill_shifted(read: Read, number: int, row: Row) -> None:
    """Fill a row from a reader of S + 1 tokens, positions and document numbers: each label is the next token."""
    tokens = np.empty(row.tokens_S.size + 1, np.int64)
    places = row.positions_S.size > 0
    positions, documents = (np.empty_like(tokens), np.empty_like(tokens)) if places else (NO_ROW, NO_ROW)
    read(number, tokens, positions, documents)
    row.tokens_S[:], row.labels_S[:] = tokens[:-1], tokens[1:]
    if places:
        row.positions_S[:], row.documents_S[:] = positions[:-1], documents[:-1]
