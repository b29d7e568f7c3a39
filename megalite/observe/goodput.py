"""Effective training time: what share of the time since a run's first start went into steps that were kept.

All of it is read from events.jsonl and metrics.jsonl, so it spans restarts, and processes that were killed. A start
without a `stop` ended, as far as can be known, with its last sign of life; what is between that and the next start is
downtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PARTS = ("training", "start-up", "checkpoints", "validation", "lost", "down", "other")
"""`lost` are steps that were refused, rolled back, or made after the last checkpoint before an end; `other` is logging
and whatever else a process does between steps."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goodput:
    """`wall` seconds since the first start, and how they divide into PARTS; `starts` counts restarts too."""

    wall: float
    seconds: Mapping[str, float]
    starts: int

    @property
    def share(self) -> float:
        return self.seconds["training"] / self.wall if self.wall > 0 else 0.0


def account(events: Sequence[Row], metrics: Iterable[Row], now: float | None = None) -> Goodput | None:
    """Divide the time from the first start to the last sign of life (or `now`, while the run goes on).

    Args:
        events: those of `read_events`, in order of time.
        metrics: the lines of metrics.jsonl.
        now: seconds since 1970; the time of a caller that is the run itself.

    Returns:
        None where there is no start among the events.
    """
    starts = [event["time"] for event in events if event["event"] == "start"]
    if not starts:
        return None
    rows = [row for row in metrics if isinstance(row.get("time"), int | float)]
    seconds = dict.fromkeys(PARTS, 0.0)
    begin, end = starts[0], starts[0]
    for start, following in itertools.zip_longest(starts, starts[1:]):
        seconds["down"] += max(0.0, start - end)

        def mine(moment: float, first: float = start, stop: float | None = following) -> bool:
            return first <= moment and (stop is None or moment < stop)

        session = [event for event in events if mine(event["time"])]
        made = [row for row in rows if mine(row["time"])]
        lost = [event for event in events if event["event"] in ("lost", "rollback") and mine(_belongs(event))]
        signs = [event["time"] for event in session] + [row["time"] for row in made]
        signs += [event["until"] for event in lost if event.get("until")]
        if now is not None and following is None:
            signs.append(now)
        stops = [event["time"] for event in session if event["event"] == "stop"]
        end = max(stops or signs, default=start)
        _divide(seconds, start, end, session, made, lost)
    return Goodput(end - begin, seconds, len(starts))


def _belongs(event: Row) -> float:
    """A moment in the session whose steps were lost: the event itself may be written by the next one."""
    return event.get("until") or event["time"]


def _divide(
    seconds: dict[str, float], start: float, end: float, session: list[Row], made: list[Row], lost: list[Row]
) -> None:
    """Add the parts of one session, from `start` to `end`."""
    ready = next((event["time"] for event in session if event["event"] == "ready"), end)
    parts = {
        "start-up": min(max(0.0, ready - start), end - start),
        "training": sum(row["step_seconds"] for row in made if row.get("loss") is not None),
        "checkpoints": sum(row.get("save_stall_seconds", 0.0) for row in made),
        "validation": sum(row.get("validation_seconds", 0.0) for row in made),
        "lost": sum(row["step_seconds"] for row in made if row.get("loss") is None)
        + sum(event.get("seconds", 0.0) for event in lost),
    }
    for name, value in parts.items():
        seconds[name] += value
    seconds["other"] += max(0.0, end - start - sum(parts.values()))


def describe_goodput(goodput: Goodput) -> str:
    """One line for the log."""
    rest = sorted(((value, name) for name, value in goodput.seconds.items() if name != "training"), reverse=True)
    shares = ", ".join(f"{name} {value / goodput.wall:.1%}" for value, name in rest if value > 0.0005 * goodput.wall)
    wall, times = timedelta(seconds=round(goodput.wall)), "once" if goodput.starts == 1 else f"{goodput.starts} times"
    return f"effective training time {goodput.share:.1%} of {wall} since the first start ({shares}; started {times})"
