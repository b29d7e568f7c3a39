"""Files of examples for alignment, as `tools/preprocess_data.py --format sft|preference|prompt` writes them.

`P_text_document` is a token file with one document for each example; of a preference file documents 2k and 2k + 1 are
the chosen and the rejected answer of pair k. Beside it lie `P_learn_document` (uint8, same lengths, 1 where the model
learns to write the token) and, of pairs and prompts, `P_columns_document` (one JSON line for each record, as bytes).

Does not import torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.index_cache import Arrays, content_key, load_or_build
from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError

BLOCK_TOKENS = 1 << 22
MEASURES_FORMAT = 2  # part of the cache key: raise it when the arrays' meaning changes
TEXT_ENDING = "text_document"
REMEDY = "make it again with tools/preprocess_data.py"


@dataclass(frozen=True)
class Maker:
    """What files of examples must have been made for: format, and hashes of tokenizer and chat template, each with a
    name for messages; empty where the recipe names none."""

    form: str
    tokenizer: str = ""
    tokenizer_sha256: str = ""
    template: str = ""
    template_sha256: str = ""


class ExampleFile:
    """One file of examples, memory-mapped.

    Attributes:
        tokens, learn: the ids, and the learn mask, by document.
        columns: JSON lines by record, or None.
        parts: documents of an example: 2 for pairs, else 1.
        learned, first: of each document how many of its labels are learned, and the place of the first learned token
            (its length where there is none), int32 [documents].

    Raises `UserError` if files are missing, damaged, do not belong together, or were made for something else.
    """

    def __init__(self, prefix: str | Path, maker: Maker, cache_dir: str | Path | None = None) -> None:
        self.prefix, self.form = str(prefix), maker.form
        self.tokens = IndexedDataset(prefix)
        self.tokens.require_lengths()
        self.facts = self.tokens.description()
        _require_made_for(self.prefix, self.facts, maker)
        self.parts = 2 if self.form == "preference" else 1
        self.learn = self._beside("learn")
        self.columns = self._beside("columns") if self.form in ("preference", "prompt") else None
        documents, records = len(self.tokens), 0 if self.columns is None else len(self.columns)
        fits = self.learn.lengths.tobytes() == self.tokens.lengths.tobytes() and self.tokens.documents == documents
        if not fits or documents % self.parts or (self.columns is not None and records * self.parts != documents):
            raise UserError(f"{self.prefix}: its files do not have the same documents; {REMEDY}")
        measures = self._measures(cache_dir)
        self.learned, self.first = measures["learned"], measures["first"]

    def __len__(self) -> int:
        """Number of examples: conversations, pairs or prompts."""
        return len(self.tokens) // self.parts

    def fingerprint(self) -> str:
        """A hash of all the contents, independent of paths."""
        files = (self.tokens, self.learn) if self.columns is None else (self.tokens, self.learn, self.columns)
        return content_key(examples=[self.form, *(file.fingerprint() for file in files)])

    def record(self, number: int) -> dict[str, Any]:
        """The columns kept of record `number`."""
        assert self.columns is not None
        try:
            columns = json.loads(self.columns[number].tobytes())
        except ValueError:
            columns = None
        if not isinstance(columns, dict):
            raise UserError(f"{self.columns.prefix}.bin: document {number} is no JSON object; {REMEDY}")
        return columns

    def _beside(self, part: str) -> IndexedDataset:
        file = IndexedDataset(f"{self.prefix.removesuffix(TEXT_ENDING)}{part}_document")
        if file.dtype != np.uint8 or self.facts.get(f"{part}_fingerprint") != file.fingerprint():
            raise UserError(f"{file.prefix}: not the file that was made with {self.prefix}; {REMEDY}")
        return file

    def _measures(self, cache_dir: str | Path | None) -> Arrays:
        key = content_key(kind="examples", format=MEASURES_FORMAT, file=self.fingerprint())
        return load_or_build(cache_dir, key, lambda: measure(self.tokens, self.learn))


def measure(tokens: IndexedDataset, learn: IndexedDataset) -> Arrays:
    """`learned` and `first` of every document (see `ExampleFile`), int32, in bounded memory.

    No label stands before an example's first token, so that one is never learned.
    """
    lengths = tokens.lengths
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
    learned, first = np.zeros_like(lengths), lengths.copy()
    begin = 0
    while begin < lengths.size:
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + BLOCK_TOKENS, side="right")) - 1)
        mask = learn.tokens[starts[begin] : starts[end]] != 0
        mask[starts[begin:end] - starts[begin]] = False
        places = np.flatnonzero(mask) + starts[begin]
        documents = np.searchsorted(starts[begin : end + 1], places, side="right") - 1 + begin
        learned[begin:end] = np.bincount(documents - begin, minlength=end - begin)
        opening = np.flatnonzero(np.diff(documents, prepend=-1))
        first[documents[opening]] = places[opening] - starts[documents[opening]]
        begin = end
    return {"learned": learned, "first": first}


@dataclass(frozen=True)
class Selection:
    """The examples of a file that are used.

    Attributes:
        numbers: their numbers in the file, int64 [n].
        lengths: tokens used of each of their documents, int32 [n, parts].
        learned: labels learned of them all.
        overlong: how many did not fit and were left out.
        cut: how many were cut.
        unlearned: how many were left out because nothing to learn was left of them.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    learned: int
    overlong: int
    cut: int
    unlearned: int

    def __len__(self) -> int:
        return self.numbers.size


def select(file: ExampleFile, span: range, room: int, truncate: bool = False) -> Selection:
    """The examples of `span` that have at most `room` tokens, or are cut to them with `truncate`.

    Of a pair the longer answer is cut first, down to the length of the other.
    """
    documents = slice(span.start * file.parts, span.stop * file.parts)
    lengths, first, learned = (
        array[documents].reshape(-1, file.parts) for array in (file.tokens.lengths, file.first, file.learned)
    )
    long = lengths.sum(1, dtype=np.int64) > room
    used, kept = lengths, ~long
    if truncate:
        limit = room if file.parts == 1 else np.maximum(room - lengths[:, ::-1], room // 2)
        used, kept = np.minimum(lengths, limit), np.ones(len(lengths), bool)
    teaches = kept if file.form == "prompt" else (first < used).all(1)
    chosen = kept & teaches
    count = int(learned[chosen].sum(dtype=np.int64))
    for row, part in zip(*np.nonzero((used < lengths) & chosen[:, None])):
        document = (span.start + int(row)) * file.parts + int(part)
        count -= int(np.count_nonzero(file.learn[document][used[row, part] :]))
    return Selection(
        np.flatnonzero(chosen) + span.start,
        used[chosen],
        count,
        overlong=int(np.count_nonzero(~kept)),
        cut=int(np.count_nonzero(long & chosen)),
        unlearned=int(np.count_nonzero(kept & ~teaches)),
    )


def _require_made_for(prefix: str, facts: dict[str, Any], maker: Maker) -> None:
    form = facts.get("format", "text")
    if form != maker.form:
        raise UserError(
            f"{prefix}.json: made with --format {form}, and this objective learns from {maker.form}; "
            f"make it with tools/preprocess_data.py --format {maker.form}"
        )
    if not prefix.endswith(TEXT_ENDING):
        raise UserError(
            f"{prefix}: does not end in {TEXT_ENDING}, so the files beside it are unknown; give it that name"
        )
    made_by = facts.get("tokenizer") or {}
    if maker.tokenizer_sha256 and made_by.get("sha256", maker.tokenizer_sha256) != maker.tokenizer_sha256:
        raise UserError(
            f"{prefix}.json: made with the tokenizer {' '.join(made_by.get('files', [])) or made_by.get('kind')} "
            f"(sha256 {made_by['sha256'][:12]}…), and data.tokenizer = {maker.tokenizer} is another "
            f"({maker.tokenizer_sha256[:12]}…); name that one, or {REMEDY}"
        )
    template = facts.get("template")
    if not facts.get("templated") or not maker.tokenizer_sha256 or not isinstance(template, dict):
        return
    if template.get("sha256") != maker.template_sha256:
        own = f"{maker.template} ({maker.template_sha256[:12]}…)" if maker.template else "none"
        raise UserError(
            f"{prefix}.json: made with the chat template {template.get('name')} ({str(template.get('sha256'))[:12]}…), "
            f"and the recipe's is {own}; set data.chat_template to that one, or {REMEDY}"
        )
