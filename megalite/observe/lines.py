"""JSON lines files that grow during a run; a full disk must not end the run."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megalite.files import write_atomically
from megalite.observe.formatting import short_path

log = logging.getLogger("megalite")

_PENDING_BYTES = 1 << 24
"""Lines that cannot be written (full disk) are buffered up to this size; beyond it the oldest are lost."""
_BLOCK_BYTES = 1 << 16
_LONGEST_LINE = 1 << 24
"""Longer lines are not ours and are skipped."""


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if invalid (truncated, damaged, nested too deep, endless digits)."""
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def iterate_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete objects of a JSON lines file, one at a time; nothing if the file cannot be read."""
    try:
        if not path.is_file():
            return
        file = path.open("rb")
    except OSError:
        return
    with file:
        skipping = False
        while line := file.readline(_LONGEST_LINE):
            whole = line.endswith(b"\n") or len(line) < _LONGEST_LINE
            if whole and not skipping and (row := parse_line(line)) is not None:
                yield row
            skipping = not whole


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete objects of a JSON lines file; a truncated line is dropped."""
    return list(iterate_lines(path))


def lines_from_end(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line of an open file, last first, read lazily."""
    end = file.seek(0, os.SEEK_END)
    tail = b""  # begins in the middle of a line
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        tail = file.read(end - start) + tail
        end = start
        if len(tail) > _LONGEST_LINE:
            return
        first, *lines = tail.split(b"\n")
        place = start + len(tail)
        for line in reversed(lines):
            place -= len(line)
            if line:
                yield place, line
            place -= 1
        tail = first
    if tail:
        yield 0, tail


def to_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON; non-finite numbers become null, and other types their text."""
    try:
        text = json.dumps(row, allow_nan=False, separators=(", ", ": "), default=str)
    except ValueError:
        text = json.dumps(_finite(row), separators=(", ", ": "), default=str)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class LineFile:
    """Appends rows to `path`. Rows that cannot be written are buffered and retried with the next row.

    `who` names the writer in the warning logged once when writing fails and once when it works again.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path, self.who = path, who
        self._pending = b""
        self._failing = False
        self._descriptor: int | None = None

    def write(self, row: Mapping[str, Any], durable: bool = False) -> None:
        """Append a row; `durable` rows survive a machine crash, the others a process crash."""
        self._pending += to_line(row)
        try:
            descriptor = self._opened()
            while self._pending:
                self._pending = self._pending[os.write(descriptor, self._pending) :]
            if durable:
                os.fsync(descriptor)
        except OSError as error:
            self._complain(error)
        else:
            if self._failing:
                log.warning("%s: %s is written again", self.who, short_path(self.path))
            self._failing = False

    def _opened(self) -> int:
        """The open file, at its end; recreated, with its folder, if someone has deleted it."""
        if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 0:
            self.close()
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._descriptor = descriptor
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                self._pending = b"\n" + self._pending  # end the line that a crash cut short
        return self._descriptor

    def _complain(self, error: OSError) -> None:
        if len(self._pending) > _PENDING_BYTES:
            self._pending = self._pending[-_PENDING_BYTES // 2 :].partition(b"\n")[2]
        if not self._failing:
            self._failing = True
            name, why = short_path(self.path), error.strerror or error
            log.warning("%s: %s cannot be written (%s); training goes on", self.who, name, why)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Atomically replace the whole file by `rows`; on a full disk the file stays as it is."""
        self.close()
        try:
            write_atomically(self.path, b"".join(map(to_line, rows)), durable=False)
        except OSError as error:
            self._complain(error)

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Remove rows from the end until `keep` holds for one; returns the removed ones, in order.

        Reads no more of the file than that. If truncating fails, the file stays as it is and a warning is logged.
        """
        dropped, at = [], None
        waiting = [row for row in map(parse_line, self._pending.splitlines()) if row is not None]
        self._pending = b"".join(to_line(row) for row in waiting if keep(row))
        try:
            with self.path.open("r+b") as file:
                for offset, line in lines_from_end(file):
                    row = parse_line(line)
                    if row is None:
                        continue
                    if keep(row):
                        break
                    dropped.append(row)
                    at = offset
                if at is not None:
                    file.truncate(at)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain(error)
        return [*reversed(dropped), *(row for row in waiting if not keep(row))]

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
