"""Examples for alignment by global number: packed rows of conversations or pairs, and prompts.

Both are pure functions of the files' contents, seed, sequence length and the recipe's packing, so the position in the
data is one integer in every layout. Does not import torch.

S tokens of a row.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.example_file import ExampleFile, Selection
from megalite.data.index_cache import content_key, load_or_build
from megalite.data.packing import ExampleOrder, Plan, plan_rows
from megalite.data.rows import Row
from megalite.errors import UserError

PLAN_FORMAT = 1  # part of the cache key: raise it when the arrays' meaning changes
UNLEARNED = -1


@dataclass(frozen=True)
class Part:
    """What is used of one file, with its share among the files; None takes each example once."""

    file: ExampleFile
    span: range
    selection: Selection
    share: float | None = None


@dataclass(frozen=True)
class Recipe:
    """What the order and the rows follow from besides the files."""

    seq_length: int
    seed: int
    packing: bool = True
    overlong: str = "drop"
    tokenizer_sha256: str = ""
    template_sha256: str = ""
    vocab_size: int | None = None


class Examples:
    """The examples of several files in the order of every epoch: what packed rows and prompts have in common.

    Raises `UserError` if no example is left.
    """

    def __init__(self, parts: Sequence[Part], recipe: Recipe) -> None:
        self.parts, self.recipe = list(parts), recipe
        counts = [len(part.selection) for part in parts]
        for part, count in zip(parts, counts):
            if count == 0 and (part.share is not None or not any(counts)):
                chosen = part.selection
                raise UserError(
                    f"{part.file.prefix}: none of its {len(part.span)} examples is left: {chosen.overlong} are longer "
                    f"than train.seq_length = {recipe.seq_length} allows, {chosen.unlearned} have nothing to learn"
                )
        shares = [part.share for part in parts if part.share is not None]
        self.order = ExampleOrder(counts, shares or None, recipe.seed)

    @property
    def per_epoch(self) -> int:
        """Examples of an epoch."""
        return self.order.total

    def place(self, member: int) -> tuple[Part, int]:
        """The file of an example of the order, and its index in the file's selection."""
        which = int(np.searchsorted(self.order.first, member, side="right")) - 1
        return self.parts[which], member - int(self.order.first[which])

    def fields(self) -> dict[str, Any]:
        """What determines the order, by recipe field, for checkpoints; JSON values. `order` is a hash of all of it."""
        recipe = self.recipe
        fields: dict[str, Any] = {
            "train.seq_length": recipe.seq_length,
            "run.seed": recipe.seed,
            "data.packing": recipe.packing,
            "data.overlong": recipe.overlong,
            "data.tokenizer": recipe.tokenizer_sha256[:16],
            "data.chat_template": recipe.template_sha256[:16],
            **{
                f"data.train[{number}]": {
                    "fingerprint": part.file.fingerprint()[:16],
                    "sequences": [part.span.start, part.span.stop],
                    "examples": len(part.selection),
                    "share": None if part.share is None else round(part.share, 6),
                }
                for number, part in enumerate(self.parts)
            },
        }
        return {"order": content_key(**fields), **fields}


class PackedExamples:
    """Conversations or pairs in rows of S tokens and S labels; see `megalite.data.rows.Rows`.

    An example's labels are its own next tokens where they are learned; its last token has none. Positions begin at 0 in
    every document, and what is left of a row is a document of padding. Of a pair, documents 2p and 2p + 1 of a row are
    the chosen and the rejected answer, and a pair never leaves its row.

    Columns: `ends` is 1 at the last token of each document but padding; `margins`, where there are any, is the pair's
    margin at the last token of the chosen answer.

    Args:
        examples: what is packed.
        planned: number of rows planned for; more can be read.
        cache_dir: folder for the plans of epochs; None keeps them in memory.
    """

    separate = True

    def __init__(self, examples: Examples, planned: int, cache_dir: str | Path | None = None) -> None:
        self.examples, self._planned, self._cache_dir = examples, planned, cache_dir
        self.seq_length = examples.recipe.seq_length
        margins = any(part.file.facts.get("margins") for part in examples.parts)
        self.columns: tuple[str, ...] = ("ends", "margins") if margins else ("ends",)
        selections = [part.selection for part in examples.parts]
        self._lengths = np.concatenate([selection.lengths.sum(1, dtype=np.int64) for selection in selections])
        self._key = examples.fields()["order"]
        self._lock = threading.Lock()
        self._plans: list[Plan] = []
        self._ends: list[int] = []  # rows of all epochs up to and with each

    def __len__(self) -> int:
        return self._planned

    def fields(self) -> dict[str, Any]:
        """See `Examples.fields`."""
        return self.examples.fields()

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch; computed alone, or read from the cache."""

        def build() -> dict[str, np.ndarray]:
            recipe = self.examples.recipe
            plan = plan_rows(self.examples.order, self._lengths, self.seq_length, epoch, recipe.packing)
            return {"starts": plan.starts, "members": plan.members}

        key = content_key(kind="packing", format=PLAN_FORMAT, order=self._key, epoch=epoch)
        arrays = load_or_build(self._cache_dir, key, build)
        return Plan(arrays["starts"], arrays["members"])

    def locate(self, number: int) -> tuple[int, int]:
        """The epoch of row `number`, and its number within it: epochs differ in their number of rows."""
        if number < 0:
            raise IndexError(f"row numbers begin at 0, not {number}")
        with self._lock:
            while not self._ends or self._ends[-1] <= number:
                plan = self.plan(len(self._plans))
                self._plans.append(plan)
                self._ends.append(len(plan) + (self._ends[-1] if self._ends else 0))
        epoch = bisect.bisect_right(self._ends, number)
        return epoch, number - (self._ends[epoch - 1] if epoch else 0)

    def members(self, number: int) -> list[int]:
        """The examples of row `number`, as numbers of the order."""
        epoch, row = self.locate(number)
        plan = self._plans[epoch]
        return plan.members[plan.starts[row] : plan.starts[row + 1]].tolist()

    def fill(self, number: int, row: Row) -> None:
        """Write row `number`. Raises `UserError` for an id outside the vocabulary."""
        row.tokens_S[:], row.labels_S[:] = 0, UNLEARNED
        for column in row.columns.values():
            column[:] = 0
        at = document = 0
        for member in self.members(number):
            part, index = self.examples.place(member)
            for answer, length in enumerate(part.selection.lengths[index].tolist()):
                example = int(part.selection.numbers[index])
                self._write(row, at, part.file, example * part.file.parts + answer, length)
                if row.documents_S.size:
                    row.positions_S[at : at + length] = np.arange(length)
                    row.documents_S[at : at + length] = document
                at, document = at + length, document + 1
                row.columns["ends"][at - 1] = 1
                if answer == 0 and "margins" in row.columns:
                    row.columns["margins"][at - 1] = part.file.record(example).get("margin", 0.0)
        if row.documents_S.size:
            row.positions_S[at:], row.documents_S[at:] = 0, document

    def _write(self, row: Row, at: int, file: ExampleFile, document: int, length: int) -> None:
        """Put the first `length` tokens of a document at `at`, and the labels that are learned."""
        ids = file.tokens.slice(document, 0, length).astype(np.int64)
        _require_known(ids, file, document, self.examples.recipe.vocab_size)
        learn = file.learn.slice(document, 0, length) != 0
        row.tokens_S[at : at + length] = ids
        row.labels_S[at : at + length - 1] = np.where(learn[1:], ids[1:], UNLEARNED)


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, its text, and the record's further columns."""

    ids: list[int]
    text: str
    columns: dict[str, Any]


class PromptDataset:
    """Prompts by global number: any number from 0 on; each epoch goes through all of them in an order of its own.

    `len(prompts)` is the number of an epoch.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self._lock = threading.Lock()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.examples.per_epoch

    def fields(self) -> dict[str, Any]:
        """See `Examples.fields`."""
        return self.examples.fields()

    def prompt(self, number: int) -> Prompt:
        """Prompt `number`. Raises `UserError` for an id outside the vocabulary."""
        if number < 0:
            raise IndexError(f"prompt numbers begin at 0, not {number}")
        epoch, place = divmod(number, len(self))
        with self._lock:
            if self._order[0] != epoch:
                self._order = (epoch, self.examples.order.members(epoch))
            member = int(self._order[1][place])
        part, index = self.examples.place(member)
        record = int(part.selection.numbers[index])
        ids = part.file.tokens[record].astype(np.int64)
        _require_known(ids, part.file, record, self.examples.recipe.vocab_size)
        columns = part.file.record(record)
        return Prompt(ids.tolist(), str(columns.pop("prompt", "")), columns)


def _require_known(ids: np.ndarray, file: ExampleFile, document: int, vocab_size: int | None) -> None:
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    bad = ids[(ids < 0) | (ids >= limit)]
    if bad.size:
        raise UserError(
            f"{file.prefix}.bin: document {document}: token id {bad[0]} is outside the vocabulary of {limit}"
            " (model.vocab_size); tokenize with the tokenizer of this model"
        )
