"""Unusable records, kept in a `.jsonl` file with their location and the reason."""

import base64
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megalite.files import PendingFile, write_errors_named
from megalite.text.records import DAMAGED, BadRecord

KEPT_BYTES = 1 << 16  # of one record; its file and line tell where the rest is
EXAMPLES = 3


class Quarantine:
    """Writes rows to `path` atomically; without any rows no file is created.

    Attributes:
        reasons: how many rows of each reason.
        examples: the first few rows.
        damaged: the first row about a damaged file, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reasons: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.damaged: dict[str, Any] | None = None
        self._pending: PendingFile | None = None

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it has at least `reason`."""
        self.reasons[row["reason"]] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(row)
        if row["reason"] == DAMAGED:
            self.damaged = self.damaged or row
        with write_errors_named(self.path):
            self._pending = self._pending or PendingFile(self.path)
            self._pending.file.write(orjson.dumps(row) + b"\n")

    def finish(self) -> None:
        """Give the file its final name, or, without rows, remove that of an earlier run."""
        with write_errors_named(self.path):
            if self._pending is None:
                self.path.unlink(missing_ok=True)
            else:
                self._pending.commit()

    def abort(self) -> None:
        """Remove the temporary file; a finished one stays."""
        if self._pending is not None:
            self._pending.abort()


def quarantine_row(record: BadRecord) -> dict[str, Any]:
    """A record as JSON values: its bytes as text (`raw`) if valid UTF-8, else as `raw_base64`."""
    row: dict[str, Any] = {
        "file": str(record.path),
        "line": record.line,
        "reason": record.reason,
        "detail": record.detail,
    }
    raw = record.raw[:KEPT_BYTES]
    try:
        row["raw"] = raw.decode()
    except UnicodeDecodeError:
        row["raw_base64"] = base64.b64encode(raw).decode()
    return row


def read_quarantine(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; none if the file does not exist."""
    if path.is_file():
        with open(path, "rb") as file:
            yield from map(orjson.loads, file)
