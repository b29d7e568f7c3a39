"""One shard of a preprocessing job: read its pieces of the input, encode, leave a finished token file or nothing."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalite.data.indexed import IndexedWriter, token_dtype
from megalite.errors import UserError
from megalite.text.quarantine import Quarantine, quarantine_row
from megalite.text.readers import EMPTY, BadRecord, ReadCounter, can_split, read_documents
from megalite.text.tokenizers import Tokenizer

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 20

# Shards are the unit of work and of resuming. Their size follows the input alone, so that the number of workers
# changes nothing: about this many, but neither tiny nor so large that an interruption costs more than a minute.
TARGET_SHARDS = 256
SMALLEST_SHARD, LARGEST_SHARD = 1 << 20, 128 << 20


@dataclass(frozen=True)
class Piece:
    """The whole of a file (`end` None), or its records that begin in bytes [start, end); `size` in bytes on disk."""

    path: str
    start: int
    end: int | None
    size: int


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens."""

    key: str
    append_eod: bool
    keep_empty: bool
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


def plan_shards(paths: Sequence[Path]) -> list[tuple[Piece, ...]]:
    """Cut the input into shards of about equal size on disk: parts of large files, or many small files together."""
    sizes = [path.stat().st_size for path in paths]
    target = min(max(sum(sizes) // TARGET_SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    shards: list[tuple[Piece, ...]] = []
    current: list[Piece] = []
    filled = 0
    for path, size in zip(paths, sizes, strict=True):
        pieces = [Piece(str(path), 0, None, size)]
        if can_split(path) and size > target:
            count = -(-size // target)
            cuts = [size * index // count for index in range(count + 1)]
            pieces = [Piece(str(path), start, end, end - start) for start, end in itertools.pairwise(cuts)]
        for piece in pieces:
            if current and filled + piece.size > target:
                shards.append(tuple(current))
                current, filled = [], 0
            current.append(piece)
            filled += piece.size
    return [*shards, tuple(current)] if current else shards


class ShardWriter:
    """Encodes the pieces of one shard into PREFIX.bin, .idx and .json; the last is its manifest and is written last.

    Args:
        prefix: of the shard's files.
        report: called after each batch with the bytes of input read since the last call; may raise to stop.
    """

    def __init__(
        self, prefix: Path, tokenizer: Tokenizer, options: EncodeOptions, report: Callable[[int], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._report = report
        self._writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
        self._batch = _Batch()
        self._bad = Quarantine(bad_records_path(prefix))
        self._empty = self._records = self._text_bytes = self._special = 0
        self._eod = np.array([tokenizer.eod] if options.append_eod else [], np.int32)

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write the whole shard; after any error none of its files is there."""
        try:
            lines = [self._read(number, piece) for number, piece in enumerate(pieces)]
            manifest = {
                "records": self._records,
                "empty": self._empty,
                "text_bytes": self._text_bytes,
                "special": self._special,
                "lines": lines,
            }
            self._bad.finish()
            self._writer.finish({"shard": manifest})
        finally:
            self._bad.abort()
            self._writer.abort()

    def _read(self, number: int, piece: Piece) -> int:
        """Encode one piece; returns how many lines (rows, files) it has."""
        counter = ReadCounter()
        reported = 0
        byte_range = None if piece.end is None else (piece.start, piece.end)

        def note_bad(record: BadRecord) -> None:
            self._records += 1
            if record.reason == EMPTY:
                self._add("")
            else:
                self._bad.add({"piece": number, **quarantine_row(record)})

        for document in read_documents(piece.path, self._options.key, byte_range, note_bad, counter, with_extra=False):
            self._records += 1
            self._add(document.text)
            if self._batch.full:
                self._flush()
                self._report(counter.bytes - reported)
                reported = counter.bytes
        self._flush()
        self._report(piece.size - reported)
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


def bad_records_path(prefix: Path) -> Path:
    """Where a shard lists the records it could not use; their lines count from the beginning of each piece."""
    return Path(f"{prefix}.bad.jsonl")


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """The manifest of a finished shard, or None where it is not finished."""
    try:
        description = orjson.loads(Path(f"{prefix}.json").read_bytes())
        complete = all(Path(f"{prefix}.{part}").is_file() for part in ("bin", "idx"))
    except (OSError, ValueError):
        return None
    return description.get("shard") if complete else None
