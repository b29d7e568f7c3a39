"""Files of JSON lines that grow while a run goes on, and that a full disk must not end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("megalite")

_PATIENCE_BYTES = 1 << 24
"""Lines that a full disk does not take are kept up to this size; the oldest of them are lost then."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete objects of a file of JSON lines; none where there is no file, a line cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def to_line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


class LineFile:
    """Appends rows to `path`. What cannot be written is kept and tried again with the next row.

    `who` names the writer in the one warning that is given when writing fails, and the one when it works again.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path, self.who = path, who
        self._pending = b""
        self._failing = False
        self._descriptor: int | None = None

    def write(self, row: Mapping[str, Any], durable: bool = False) -> None:
        """Append a row; `durable` rows survive the machine's end, the others that of the process."""
        self._pending += to_line(row)
        try:
            if self._descriptor is None:
                self._open()
            assert self._descriptor is not None
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            self._complain(error)
        else:
            if self._failing:
                log.warning("%s: %s is written again", self.who, self.path)
            self._failing = False

    def _open(self) -> None:
        """Open at the end; a line that a crash cut short is closed first."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            self._pending = b"\n" + self._pending
        self._descriptor = descriptor

    def _complain(self, error: OSError) -> None:
        if len(self._pending) > _PATIENCE_BYTES:
            self._pending = self._pending[-_PATIENCE_BYTES // 2 :].partition(b"\n")[2]
        if not self._failing:
            self._failing = True
            log.warning("%s: %s cannot be written (%s); training goes on", self.who, self.path, error.strerror)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put `rows` in the place of the whole file, at once; a full disk leaves it as it is."""
        self.close()
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_bytes(b"".join(map(to_line, rows)))
            os.replace(partial, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._complain(error)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
