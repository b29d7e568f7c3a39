"""Log-likelihood requests as work for the model: each distinct request once, equal inputs once, rows filled.

A request is (context, continuation), both token ids. The model reads the *input*, all but the last token, and the
*label* at the places of the continuation is the token that follows. Requests with the same input (the letters of a
multiple-choice question) are one document with several labels; documents are packed into rows of one length, which the
attention keeps apart. So equal requests have answers of equal bits, and a tie between them stays one. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megalite.data.packing import best_fit
from megalite.errors import UserError

Ids = Sequence[int] | np.ndarray
Request = tuple[Ids, Ids]
"""(context, continuation), at least one token each."""

MULTIPLE = 64
"""Rows are a multiple of this many positions: whole tiles of a kernel, and divisible by the tensor ranks."""


@dataclass
class Document:
    """One input, int32 [tokens], and the labels that are looked up in it: (place, label, number of the answer)."""

    input: np.ndarray
    labels: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass
class Work:
    """What requests come to: `answer_of[request]` is the number of its answer; `cut` counts cut contexts."""

    documents: list[Document]
    answer_of: list[int]
    answers: int
    cut: int


def collect(requests: Sequence[Request], longest: int) -> Work:
    """Each distinct request becomes one answer, each distinct input one document.

    An input of more than `longest` tokens is cut on the left, as lm-evaluation-harness does. Raises UserError where the
    continuation alone is longer.
    """
    documents: dict[bytes, Document] = {}
    answers: dict[tuple[bytes, int], int] = {}
    answer_of, cut = [], 0
    for context, continuation in requests:
        if not len(context) or not len(continuation):
            raise ValueError("a request needs at least one token of context and one of continuation")
        if len(continuation) > longest:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the model's "
                f"model.max_positions = {longest}; shorten it, or use a model that reads more"
            )
        ids = np.concatenate((np.asarray(context, np.int32), np.asarray(continuation, np.int32)))
        cut += len(ids) > longest + 1
        ids = ids[-(longest + 1) :]
        key = (ids.tobytes(), len(continuation))
        number = answers.get(key)
        if number is None:
            number = answers[key] = len(answers)
            document = documents.setdefault(key[0][:-4], Document(ids[:-1]))
            first = len(ids) - len(continuation)
            document.labels += [(place, int(ids[place + 1]), number) for place in range(first - 1, len(ids) - 1)]
        answer_of.append(number)
    return Work(list(documents.values()), answer_of, len(answers), cut)


def fill_rows(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of documents by row of `length` positions: the longest first, each into the fullest row it still fits."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    rows = best_fit([lengths[number] for number in order], length, open_rows=len(order))
    return [[order[place] for place in row] for row in rows]


def pack(lengths: Sequence[int], ranks: int, most: int) -> tuple[int, list[list[int]]]:
    """(positions of a row, numbers of documents by row), so that each of `ranks` gets as many rows as the others.

    A row has about `most` positions; fewer where the documents do not fill them, and always enough for the longest.
    """
    total, longest = sum(lengths), max(lengths)
    count = -(-total // (most * ranks)) * ranks
    length = _rounded(max(-(-total // count), longest))
    while len(rows := fill_rows(lengths, length)) > count:
        length = _rounded(length + length // 32 + 1)  # documents rarely fill rows to the last position
    return length, rows


def _rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class Block:
    """Rows that go through the pipeline together: int32 arrays [rows, length], and the labels [labels].

    Free positions at the end of a row are one more document of it. `row`, `place` and `label` say what is looked up,
    `answer` to which answer it counts.
    """

    tokens: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    row: np.ndarray
    place: np.ndarray
    label: np.ndarray
    answer: np.ndarray
    packed: bool
    """Whether any row holds more than one document."""


def blocks(documents: Sequence[Document], rows: Sequence[Sequence[int]], length: int, most: int) -> Iterator[Block]:
    """The rows as blocks of at most `most` of them."""
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        tokens, positions, numbers = (np.zeros((len(part), length), np.int32) for _ in range(3))
        found: list[tuple[int, int, int, int]] = []
        for row, members in enumerate(part):
            first = 0
            for number, document in enumerate(documents[member] for member in members):
                stop = first + len(document.input)
                tokens[row, first:stop] = document.input
                positions[row, first:stop] = np.arange(stop - first)
                numbers[row, first:stop] = number
                found += [(row, first + place, label, answer) for place, label, answer in document.labels]
                first = stop
            numbers[row, first:] = len(members)
        places = np.array(found, np.int32).T
        packed = any(len(members) > 1 for members in part)
        yield Block(tokens, positions, numbers, places[0], places[1], places[2], places[3], packed)
