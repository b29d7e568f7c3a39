"""The events of a run, in events.jsonl: starts, stops, restarts, rollbacks, failed checkpoints, lost and slow ranks.

One JSON object per line: `event`, `time` (seconds since 1970) and its details. Rank 0 writes them; only lost ranks are
recorded by the lowest rank still running. The file persists across restarts, and a killed process leaves everything it
wrote: an end without a `stop` is recognised at the next start.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from megalite.observe.lines import LineFile, iterate_lines
from megalite.observe.metrics import moment, whole

EVENTS = "events.jsonl"
_NUMBERS = ("time", "until", "seconds", "median")
_WHOLE = ("step", "to_step", "steps", "ranks", "rank", "code", "signal", "pid")
_LISTS = ("samples",)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run in chronological order. Invalid events and fields are dropped."""
    rows = [row for row in map(_clean, iterate_lines(run_dir / EVENTS)) if row is not None]
    return sorted(rows, key=lambda row: row["time"])


def _clean(row: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(row.get("event"), str) or moment(row.get("time")) is None:
        return None
    return {key: value for key, value in row.items() if _is_usable(row["event"], key, value)}


def _is_usable(event: str, key: str, value: Any) -> bool:
    if key in _LISTS or (key == "ranks" and event == "no_answer"):
        return isinstance(value, list) and all(whole(each) is not None for each in value)
    if key in _WHOLE:
        return whole(value) is not None
    if key in _NUMBERS:
        return moment(value) is not None
    return not isinstance(value, dict | list)


def process_start() -> float:
    """When this process was started, in seconds since 1970; the current time if unknown."""
    now = time.time()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


class EventLog:
    """Appends events to a run's file, each synced when `write` returns. Ranks other than 0 write nothing."""

    def __init__(self, run_dir: str | Path, rank: int) -> None:
        self._file = LineFile(Path(run_dir) / EVENTS, f"rank {rank}")
        self.is_writer = rank == 0

    def write(self, event: str, *, at: float | None = None, **facts: Any) -> None:
        if self.is_writer:
            when = time.time() if at is None else at
            self._file.write({"event": event, "time": round(when, 3), **facts}, durable=True)

    def write_start(self, ranks: int) -> None:
        """Record the start, or restart, of the run by this process."""
        job = {key: os.environ[name] for key, name in _JOB if os.environ.get(name)}
        self.write("start", at=process_start(), ranks=ranks, host=socket.gethostname(), pid=os.getpid(), **job)

    def close(self) -> None:
        self._file.close()


_JOB = (("job", "SLURM_JOB_ID"), ("restart", "SLURM_RESTART_COUNT"))
