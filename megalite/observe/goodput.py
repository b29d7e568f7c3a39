"""Goodput (effective training time): the share of the time since a run's first start spent in steps that were kept.

Computed from events.jsonl and metrics.jsonl, so it covers restarts and killed processes. A start without a `stop` is
taken to end at its last sign of life; the time from there to the next start is downtime.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from megalite.observe.formatting import times

PARTS = ("training", "start-up", "checkpoints", "validation", "lost", "down", "other")
"""`lost` are steps that were refused, had nothing to learn, were rolled back, or were not checkpointed before the end;
`other` is logging and everything else between steps."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goodput:
    """`wall` seconds since the first start, and their breakdown by PARTS; `starts` includes restarts."""

    wall: float
    seconds: Mapping[str, float]
    starts: int

    @property
    def share(self) -> float:
        return self.seconds["training"] / self.wall if self.wall > 0 else 0.0


@dataclass
class _Session:
    """One start, up to the next: `end` is its `stop`, or its last sign of life."""

    start: float
    end: float
    ready: float | None = None
    stopped: bool = False
    training: float = 0.0
    checkpoints: float = 0.0
    validation: float = 0.0
    lost: float = 0.0

    def seen(self, moment: float) -> None:
        if not self.stopped:
            self.end = max(self.end, moment)

    def take_event(self, event: Row) -> None:
        if event["event"] == "stop":
            self.end, self.stopped = max(self.start, event["time"]), True
        if event["event"] == "ready" and self.ready is None:
            self.ready = event["time"]
        self.seen(event["time"])

    def take_row(self, row: Row) -> None:
        """A line of metrics.jsonl; a step without a loss was refused, or had nothing to learn."""
        seconds = max(0.0, row.get("step_seconds") or 0.0)
        if row.get("loss") is None:
            self.lost += seconds
        else:
            self.training += seconds
        self.checkpoints += max(0.0, row.get("save_stall_seconds") or 0.0)
        self.validation += max(0.0, row.get("validation_seconds") or 0.0)
        self.seen(row["time"])

    def parts(self) -> dict[str, float]:
        whole = self.end - self.start
        ready = self.end if self.ready is None else self.ready
        known = {
            "start-up": min(max(0.0, ready - self.start), whole),
            "training": self.training,
            "checkpoints": self.checkpoints,
            "validation": self.validation,
            "lost": self.lost,
        }
        return known | {"other": max(0.0, whole - sum(known.values()))}


def account(events: Sequence[Row], metrics: Iterable[Row], now: float | None = None) -> Goodput | None:
    """Break down the time from the first start to the last sign of life (or `now`, while the run is going on).

    One streaming pass over the lines, in constant memory.

    Args:
        events: from `read_events`, in chronological order.
        metrics: the lines of metrics.jsonl.
        now: seconds since 1970; passed when the caller is the run itself.

    Returns:
        None if there is no start among the events.
    """
    sessions = [_Session(event["time"], event["time"]) for event in events if event["event"] == "start"]
    if not sessions:
        return None
    starts = [session.start for session in sessions]

    def session_at(moment: float) -> _Session | None:
        place = bisect.bisect_right(starts, moment)
        return sessions[place - 1] if place else None

    for event in events:
        if session := session_at(event["time"]):
            session.take_event(event)
        # Lost steps belong to the start that made them, found by time: the next start may have written the event.
        if event["event"] in ("lost", "rollback") and (session := session_at(event.get("until") or event["time"])):
            session.lost += event.get("seconds") or 0.0
            session.seen(event.get("until") or event["time"])
    for row in metrics:
        if row.get("time") is not None and (session := session_at(row["time"])):
            session.take_row(row)
    if now is not None:
        sessions[-1].seen(now)
    seconds = dict.fromkeys(PARTS, 0.0)
    for earlier, session in itertools.pairwise([None, *sessions]):
        assert session is not None
        seconds["down"] += max(0.0, session.start - earlier.end) if earlier else 0.0
        for name, value in session.parts().items():
            seconds[name] += value
    return Goodput(sessions[-1].end - starts[0], seconds, len(starts))


def describe_goodput(goodput: Goodput) -> str:
    """One line for the log."""
    rest = sorted(((value, name) for name, value in goodput.seconds.items() if name != "training"), reverse=True)
    shares = ", ".join(f"{name} {value / goodput.wall:.1%}" for value, name in rest if value > 0.0005 * goodput.wall)
    wall = timedelta(seconds=round(goodput.wall))
    shares = f"{shares}; " if shares else ""
    started = f"started {times(goodput.starts)}"
    return f"effective training time {goodput.share:.1%} of {wall} since the first start ({shares}{started})"
