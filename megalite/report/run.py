"""Reading a run directory, whatever state it was left in."""

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
from megalite.observe.events import EVENTS, read_events
from megalite.observe.goodput import Goodput, account
from megalite.observe.lines import read_lines
from megalite.observe.metrics import read_metrics
from megalite.observe.timeline import TIMELINE, current, merge

_MARKS = ("metrics.jsonl", "config.toml", EVENTS)
_MOST_RANKS = 1024
"""Ranks whose files are read; a larger job is judged by this many, evenly spread."""
_LOG_TAIL = 1 << 16


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
        if self.mean is None:
            return 0.0
        others = ("reduce", "gather")
        parts = self.mean["seconds"].items()
        return sum(value for name, value in parts if not name.startswith("wait") and name not in others)


@dataclass(frozen=True)
class Run:
    """What a run directory tells. `name` is short and unlike those of the other runs on the page."""

    path: Path
    name: str
    config: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    ranks: list[RankTimes] = field(default_factory=list)
    complaints: list[tuple[str, str]] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One value a step; nan where there is none."""
        return [_number(row.get(name)) for row in self.rows]

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
    def goodput(self) -> Goodput | None:
        return account(self.events, self.rows)

    def happened(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in kinds]

    def setting(self, section: str, name: str, otherwise: Any = None) -> Any:
        return self.config.get(section, {}).get(name, otherwise)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def read_run(path: Path, name: str) -> Run:
    """Read what there is. Raises UserError where `path` is no run directory."""
    if not path.is_dir() or not any((path / mark).is_file() for mark in _MARKS):
        found = "is not a directory" if not path.is_dir() else f"holds none of {', '.join(_MARKS)}"
        raise UserError(f"{path} {found}; name the run.dir of a run")
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    rows = {row["step"]: row for row in read_metrics(path / "metrics.jsonl")}
    events = [row for row in read_events(path) if isinstance(row.get("event"), str)]
    ordered = [rows[step] for step in sorted(rows)]
    return Run(path, name, config, ordered, events, list(_read_ranks(path)), list(_read_complaints(path)))


def _spread(paths: list[Path]) -> list[Path]:
    stride = -(-len(paths) // _MOST_RANKS) or 1
    return paths[::stride]


def _read_ranks(path: Path) -> Iterator[RankTimes]:
    for file in _spread(sorted((path / TIMELINE).glob("rank_*.jsonl"))):
        rows = read_lines(file)
        heads = [row for row in rows if "rank" in row and "shape" in row]
        if not heads:
            continue
        head = heads[-1]
        samples = {row["step"]: row for row in rows if "operations" in row}
        coordinate = {axis: int(head.get(axis, 0)) for axis in head["shape"]}
        yield RankTimes(
            int(head["rank"]), str(head.get("host", "?")), coordinate, head["shape"], current(rows), samples
        )


def _read_complaints(path: Path) -> Iterator[tuple[str, str]]:
    """(rank's log, line) of the warnings and errors at the ends of the logs."""
    for file in _spread(sorted((path / "log").glob("rank_*.log"))):
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _LOG_TAIL))
            text = opened.read().decode("utf-8", errors="replace")
        for line in text.splitlines():
            words = line.split(" ", 3)
            if len(words) == 4 and words[2] in ("WARNING", "ERROR"):
                yield file.stem, line


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
