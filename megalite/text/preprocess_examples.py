"""One shard of a preprocessing job whose records are examples for alignment (`megalite.text.example_encoder`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megalite.data.indexed import IndexedWriter, token_dtype
from megalite.text.example_encoder import Encoded, ExampleEncoder, Unusable, uses_template
from megalite.text.jobs import FilePart, Report, noted
from megalite.text.preprocess_shard import STAGE, ShardTask
from megalite.text.quarantine import Quarantine, quarantine_row
from megalite.text.readers import read_records
from megalite.text.records import BadRecord, ReadCounter, Record

BATCH_TOKENS = 1 << 18

PARTS = {"sft": ("", "learn"), "preference": ("", "learn", "columns"), "prompt": ("", "learn", "columns")}
"""By format: the token file and those beside it. `learn` has one byte for each token, `columns` one JSON line for each
record, as bytes."""


@dataclass(frozen=True)
class ExampleTask(ShardTask):
    """One shard of examples to be made."""

    encoder: ExampleEncoder
    max_record_bytes: int


@noted(STAGE)
def encode_examples(task: ExampleTask, report: Report) -> dict[str, Any]:
    """Encode a shard into its token file and those beside it.

    Returns:
        `records`, `examples`, `learned` (tokens), `templated` (records with messages), `margins`, and `lines`.
    """
    return _ExampleShard(task, report).write()


class _ExampleShard:
    def __init__(self, task: ExampleTask, report: Report) -> None:
        self._task, self._report = task, report
        vocabulary = task.encoder.vocab_size
        self._writers = {
            part: IndexedWriter(f"{task.prefix}{part}", np.dtype(np.uint8) if part else token_dtype(vocabulary))
            for part in PARTS[task.encoder.form]
        }
        self._bad = Quarantine(task.bad_records)
        self._counts = Counter({"records": 0, "examples": 0, "learned": 0, "templated": 0, "margins": 0})
        self._pending: dict[str, list[np.ndarray]] = {part: [] for part in self._writers}
        self._tokens = 0

    def write(self) -> dict[str, Any]:
        """Write the whole shard; after an error none of its files remain."""
        try:
            lines = [self._read(number, piece) for number, piece in enumerate(self._task.unit.pieces)]
            self._bad.finish()
            for writer in self._writers.values():
                writer.finish()
        finally:
            self._bad.abort()
            for writer in self._writers.values():
                writer.abort()
        return {**self._counts, "lines": lines}

    def _read(self, number: int, piece: FilePart) -> int:
        counter, reported = ReadCounter(), 0

        def note_bad(record: BadRecord) -> None:
            self._counts["records"] += 1
            self._bad.add({"piece": number, **quarantine_row(record)})

        limit = self._task.max_record_bytes
        for record in read_records(piece.path, piece.byte_range, note_bad, counter, limit):
            try:
                encoded = self._task.encoder.encode(record.fields)
            except Unusable as problem:
                note_bad(BadRecord(Path(piece.path), record.line, problem.reason, str(problem), record.raw))
                continue
            self._add(record, encoded)
            if self._tokens >= BATCH_TOKENS:
                self._flush()
                self._report(counter.bytes - reported)
                reported = counter.bytes
        self._flush()
        self._report(piece.end - piece.start - reported)
        return counter.lines

    def _add(self, record: Record, encoded: Encoded) -> None:
        for example in encoded.examples:
            self._pending[""].append(np.array(example.ids, np.int64))
            self._pending["learn"].append(np.array(example.learn, np.uint8))
            self._tokens += len(example.ids)
        if "columns" in self._pending:
            line = orjson.dumps(
                encoded.columns, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
            )
            self._pending["columns"].append(np.frombuffer(line, np.uint8))
        learned = sum(map(sum, (example.learn for example in encoded.examples)))
        self._counts.update(
            records=1,
            examples=1,
            learned=learned,
            templated=uses_template(record.fields),
            margins="margin" in encoded.columns and self._task.encoder.form == "preference",
        )

    def _flush(self) -> None:
        for part, arrays in self._pending.items():
            if arrays:
                lengths = np.array([array.size for array in arrays], np.int32)
                self._writers[part].add_documents(np.concatenate(arrays), lengths)
                arrays.clear()
        self._tokens = 0
