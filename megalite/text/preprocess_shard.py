"""One shard of a preprocessing job: read its pieces of the input, encode, leave a finished token file or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.indexed import IndexedWriter, token_dtype
from megalite.errors import UserError
from megalite.text.jobs import FilePart, Report, Unit, noted, plan_units
from megalite.text.quarantine import Quarantine, quarantine_row
from megalite.text.readers import read_documents
from megalite.text.records import EMPTY, BadRecord, ReadCounter
from megalite.text.tokenizers import Tokenizer

STAGE = "encode"
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 20

# Shards are the unit of work and of resuming. Their size follows the input alone, so that the number of workers
# changes nothing: about this many, but neither tiny nor so large that an interruption costs more than a minute.
TARGET_SHARDS = 256
SMALLEST_SHARD, LARGEST_SHARD = 1 << 20, 128 << 20


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens."""

    key: str
    append_eod: bool
    keep_empty: bool
    max_record_bytes: int
    allow_special: bool  # whether special tokens in a text become these tokens; the tokenizer was loaded so


@dataclass
class _Batch:
    texts: list[str] = field(default_factory=list)
    characters: int = 0

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.characters += len(text)

    @property
    def full(self) -> bool:
        return self.characters >= BATCH_CHARACTERS or len(self.texts) >= BATCH_DOCUMENTS


def plan_shards(paths: Sequence[Path]) -> list[Unit]:
    """Cut the input into shards of about equal size on disk: parts of large files, or many small files together."""
    total = sum(path.stat().st_size for path in paths)
    target = min(max(total // TARGET_SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    return plan_units(paths, target, target)


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made in the directory `output`."""

    unit: Unit
    output: Path

    @property
    def prefix(self) -> Path:
        return self.output / f"{self.unit.number:06d}"

    @property
    def bad_records(self) -> Path:
        """Where the shard lists the records it could not use; their lines count from the beginning of each piece."""
        return Path(f"{self.prefix}.bad.jsonl")


@dataclass(frozen=True)
class EncodeTask(ShardTask):
    """One shard of texts to be made."""

    tokenizer: Tokenizer
    options: EncodeOptions


@noted(STAGE)
def encode_unit(task: EncodeTask, report: Report) -> dict[str, Any]:
    """Encode a shard into its token file.

    Returns:
        `records`, `empty`, `text_bytes`, `special`, and `lines`: how many lines (rows, files) each piece has.
    """
    return _Encoder(task, report).write()


class _Encoder:
    """`report` is called after each batch with the bytes of input read since the last call."""

    def __init__(self, task: EncodeTask, report: Report) -> None:
        self._task, self._options, self._tokenizer = task, task.options, task.tokenizer
        self._report = report
        self._writer = IndexedWriter(task.prefix, token_dtype(task.tokenizer.vocab_size))
        self._batch = _Batch()
        self._bad = Quarantine(task.bad_records)
        self._empty = self._records = self._text_bytes = self._special = 0
        self._eod = np.array([task.tokenizer.eod] if task.options.append_eod else [], np.int32)

    def write(self) -> dict[str, Any]:
        """Write the whole shard; after an error none of its files remain."""
        try:
            lines = [self._read(number, piece) for number, piece in enumerate(self._task.unit.pieces)]
            self._bad.finish()
            self._writer.finish()
        finally:
            self._bad.abort()
            self._writer.abort()
        counts = {"records": self._records, "empty": self._empty, "text_bytes": self._text_bytes}
        return counts | {"special": self._special, "lines": lines}

    def _read(self, number: int, piece: FilePart) -> int:
        """Encode one piece; returns how many lines (rows, files) it has."""
        counter = ReadCounter()
        reported = 0
        key, limit = self._options.key, self._options.max_record_bytes

        def note_bad(record: BadRecord) -> None:
            self._records += 1
            if record.reason == EMPTY:
                self._add("")
            else:
                self._bad.add({"piece": number, **quarantine_row(record)})

        for document in read_documents(piece.path, key, piece.byte_range, note_bad, counter, False, limit):
            self._records += 1
            self._add(document.text)
            if self._batch.full:
                self._flush()
                self._report(counter.bytes - reported)
                reported = counter.bytes
        self._flush()
        self._report(piece.end - piece.start - reported)
        return counter.lines

    def _add(self, text: str) -> None:
        if text or self._options.keep_empty:
            self._batch.add(text)
        else:
            self._empty += 1

    def _flush(self) -> None:
        texts, self._batch = self._batch.texts, _Batch()
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        for ids in self._tokenizer.encode_batch(texts):
            if not ids.size and not self._options.keep_empty:
                self._empty += 1  # nothing but what the tokenizer's normalisation removes
                continue
            eod = self._eod if ids.size else self._eod[:0]
            parts += (ids, eod)
            lengths.append(ids.size + eod.size)
        if not parts:
            return
        tokens = np.concatenate(parts)
        if tokens.size and int(tokens.max()) >= self._tokenizer.vocab_size:
            raise UserError(
                f"--tokenizer-model: it made id {tokens.max()}, but says its vocabulary has"
                f" {self._tokenizer.vocab_size} entries; the tokenizer's files do not belong together"
            )
        self._writer.add_documents(tokens, np.array(lengths, np.int32))
        self._special += sum(map(self._tokenizer.count_special, texts))
        self._text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
