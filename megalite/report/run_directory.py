"""Reading a run directory, whatever state it is in."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.errors import UserError
from megalite.mesh import AXES
from megalite.observe.events import EVENTS, read_events
from megalite.observe.goodput import Goodput, account
from megalite.observe.lines import read_lines
from megalite.observe.metrics import final_losses, number, read_metrics, whole
from megalite.observe.timeline import TIMELINE, current, merge, own_work
from megalite.schedule.ops import COMPUTE, ScheduleError, parse_op

_MARKS = ("metrics.jsonl", "config.toml", EVENTS)
_MOST_RANKS = 1024
"""Ranks whose files are read; a larger job is judged by this many, evenly spread."""
_LOG_TAIL = 1 << 16
_MOST_SECONDS, _MOST_STAGES = 1e9, 1 << 12
"""What a timeline may hold; more is damage."""


@dataclass(frozen=True)
class RankTimes:
    """One rank's timeline: who it is, its rows of mean seconds a step, and the operations of its latest samples."""

    rank: int
    host: str
    coordinate: Mapping[str, int]
    shape: Mapping[str, int]
    rows: list[dict[str, Any]]
    samples: dict[int, dict[str, Any]]

    @cached_property
    def mean(self) -> dict[str, Any] | None:
        """Mean seconds by phase over the later half of the steps: start-up and first compilations are not the run."""
        if not self.rows:
            return None
        half = (self.rows[0]["first"] + self.rows[-1]["last"]) / 2
        late = [row for row in self.rows if row["last"] >= half]
        total = late[0]
        for row in late[1:]:
            total = merge(total, row)
        return total

    @property
    def work(self) -> float:
        """Seconds a step of this rank's own work: neither waits nor communication."""
        return 0.0 if self.mean is None else own_work(self.mean["seconds"])


@dataclass(frozen=True)
class Run:
    """The content of a run directory. `name` is short and unique on the page."""

    path: Path
    name: str
    config: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    ranks: list[RankTimes] = field(default_factory=list)
    complaints: list[tuple[str, str]] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One value a step; nan if there is none."""
        return [math.nan if row.get(name) is None else row[name] for row in self.rows]

    @property
    def tokens(self) -> list[float]:
        return self.column("tokens")

    def last(self, name: str) -> float | None:
        found = [value for value in self.column(name) if math.isfinite(value)]
        return found[-1] if found else None

    def median(self, name: str) -> float | None:
        """Over the later half of the steps."""
        found = [value for value in self.column(name)[len(self.rows) // 2 :] if math.isfinite(value)]
        return statistics.median(found) if found else None

    @cached_property
    def final_losses(self) -> tuple[float, float]:
        """(training, validation), each nan if there is none."""
        return final_losses(self.column("loss"), self.column("validation_loss"))

    @cached_property
    def goodput(self) -> Goodput | None:
        return account(self.events, self.rows)

    def happened(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in kinds]

    def setting(self, section: str, name: str, otherwise: Any = None) -> Any:
        return self.config.get(section, {}).get(name, otherwise)


def read_run(path: Path, name: str) -> Run:
    """Read a run directory, skipping damaged content. Raises UserError if `path` is not a run directory."""
    if not path.is_dir() or not any((path / mark).is_file() for mark in _MARKS):
        found = "is not a directory" if not path.is_dir() else f"holds none of {', '.join(_MARKS)}"
        raise UserError(f"{path} {found}; name the run.dir of a run")
    rows = {row["step"]: row for row in read_metrics(path / "metrics.jsonl")}
    ordered = [rows[step] for step in sorted(rows)]
    ranks, complaints = list(_read_ranks(path)), list(_read_complaints(path))
    return Run(path, name, _read_config(path / "config.toml"), ordered, read_events(path), ranks, complaints)


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return {section: fields for section, fields in config.items() if isinstance(fields, dict)}


def _spread(paths: list[Path]) -> list[Path]:
    stride = -(-len(paths) // _MOST_RANKS) or 1
    return paths[::stride]


def _read_ranks(path: Path) -> Iterator[RankTimes]:
    for file in _spread(sorted((path / TIMELINE).glob("rank_*.jsonl"))):
        rows = read_lines(file)
        heads = [row for row in rows if whole(row.get("rank")) is not None and isinstance(row.get("shape"), dict)]
        if not heads:
            continue
        head = heads[-1]
        shape = {axis: whole(head["shape"].get(axis)) or 1 for axis in AXES}
        coordinate = {axis: whole(head.get(axis)) or 0 for axis in AXES}
        times = current([row for row in rows if _is_mean(row)])
        samples = {row["step"]: row for row in rows if _is_sample(row)}
        yield RankTimes(head["rank"], str(head.get("host", "?")), coordinate, shape, times, samples)


def _seconds(value: Any) -> bool:
    return (found := number(value)) is not None and abs(found) < _MOST_SECONDS


def _is_mean(row: dict[str, Any]) -> bool:
    """Whether a row of a timeline holds mean seconds of some steps."""
    first, last, steps = (whole(row.get(name)) for name in ("first", "last", "steps"))
    seconds = row.get("seconds")
    if first is None or last is None or not steps or not isinstance(seconds, dict):
        return False
    memory = row.get("memory_gib", 0.0)
    return first <= last and _seconds(memory) and all(_seconds(value) and value >= 0 for value in seconds.values())


def _is_sample(row: dict[str, Any]) -> bool:
    """Whether a row of a timeline holds the operations of a step, some of them computing."""
    operations, waits = row.get("operations"), row.get("waits", [])
    if whole(row.get("step")) is None or not isinstance(operations, list) or not isinstance(waits, list):
        return False
    spans = [*operations, *waits]
    if not all(isinstance(span, list) and len(span) == 3 and isinstance(span[0], str) for span in spans):
        return False
    if not all(_seconds(start) and _seconds(end) and start <= end for _, start, end in spans):
        return False
    try:
        made = [parse_op(text) for text, _, _ in operations]
    except (ScheduleError, ValueError):
        return False
    return any(op.kind in COMPUTE for op in made) and all(op.stage < _MOST_STAGES for op in made)


def _read_complaints(path: Path) -> Iterator[tuple[str, str]]:
    """(rank's log, line) of the warnings and errors at the ends of the logs."""
    for file in _spread(sorted((path / "log").glob("rank_*.log"))):
        for line in _tail(file).splitlines():
            words = line.split(" ", 3)
            if len(words) == 4 and words[2] in ("WARNING", "ERROR"):
                yield file.stem, line


def _tail(file: Path) -> str:
    try:
        if not file.is_file():
            return ""
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _LOG_TAIL))
            return opened.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_runs(paths: list[Path]) -> list[Run]:
    """Read all runs; each gets the shortest end of its path that no other has."""
    resolved = [path.resolve() for path in paths]
    doubled = {str(path) for path in resolved if resolved.count(path) > 1}
    if doubled:
        raise UserError(f"{', '.join(sorted(doubled))} is named twice; name each run once")
    for depth in range(1, 32):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return [read_run(path, name) for path, name in zip(paths, names)]
