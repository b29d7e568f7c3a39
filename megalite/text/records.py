"""What every reader gives: documents, and records that cannot be used with the reason why."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_RECORD_BYTES = 256 << 20  # a longer record is unusable: memory then follows from this, never from the input

# Reasons why a record (or the rest of a file) cannot be used
INVALID_UTF8 = "invalid UTF-8"
BROKEN_JSON = "broken JSON"
NOT_AN_OBJECT = "not a JSON object"
MISSING_KEY = "missing key"
NOT_TEXT = "not text"
EMPTY = "empty text"
LONE_SURROGATE = "lone surrogate"
TOO_LONG = "record too long"
BINARY = "binary file"
MISNAMED = "misnamed file"
DAMAGED = "damaged file"
EMPTY_ANSWER = "empty answer"
NOTHING_TO_LEARN = "nothing to learn"
NO_TEMPLATE = "chat template"
WRONG_FIELD = "wrong field"


@dataclass(slots=True)
class Document:
    """One text with the line (from 1; rows of a table) it begins at, and the record's other fields."""

    text: str
    line: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Record:
    """The fields of one record with its line (from 1; rows of a table), and its bytes if known."""

    fields: dict[str, Any]
    line: int
    raw: bytes = b""


@dataclass(slots=True)
class BadRecord:
    """An unusable record: where, why (one of the reasons above), a description, and its bytes if known."""

    path: Path
    line: int
    reason: str
    detail: str
    raw: bytes = b""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}: {self.detail}"


@dataclass(slots=True)
class ReadCounter:
    """How far a reader is: bytes of the file (compressed ones where it is) and lines, rows or files seen."""

    bytes: int = 0
    lines: int = 0


OnBad = Callable[[BadRecord], None]


class Damaged(Exception):
    """The file ends too early or its compression is broken."""


def too_long(path: Path, line: int, size: int, limit: int, what: str = "record") -> BadRecord:
    """The bad record for one of `size` bytes where `limit` are allowed."""
    detail = f"a {what} of {size:,} bytes; --max-record-bytes allows {limit:,}"
    return BadRecord(path, line, TOO_LONG, detail)
