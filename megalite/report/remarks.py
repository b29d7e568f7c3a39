"""Notable findings of a run as text: lost and slow ranks, failed checkpoints, rollbacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from megalite.observe.formatting import counted, times
from megalite.observe.slow import compare_ranks
from megalite.report.run_directory import RankTimes, Run


@dataclass(frozen=True)
class Remark:
    """A sentence; `serious` where someone should act."""

    serious: bool
    text: str


def slow_ranks(ranks: list[RankTimes]) -> dict[int, tuple[str, bool]]:
    """{rank: (why it is called slow, whether that is certain)}, by the rule of `megalite.observe.slow`."""
    stages = {rank.rank: rank.coordinate.get("pp", 0) for rank in ranks}
    found = {}
    for each in compare_ranks({rank.rank: rank.work for rank in ranks}, stages):
        if each.slow:
            why = f"{each.ratio:.2f} times the work of " + ("its peers" if each.certain else "the median rank")
            unless = "" if each.certain else f", unless stage {each.stage} has more to do"
            found[each.rank] = (why + unless, each.certain)
    return found


def remarks(run: Run) -> list[Remark]:
    """All findings, serious ones first."""
    return sorted(_remarks(run), key=lambda remark: not remark.serious)


def _remarks(run: Run) -> Iterator[Remark]:
    hosts = {rank.rank: rank.host for rank in run.ranks}

    def named(rank: int) -> str:
        return f"rank {rank}" + (f" ({hosts[rank]})" if rank in hosts else "")

    for event in run.happened("no_answer"):
        lost = ", ".join(named(rank) for rank in event.get("ranks", []))
        yield Remark(True, f"No answer from {lost} at {when(event)}: dead or hung.")
    for rank, (why, certain) in slow_ranks(run.ranks).items():
        name = named(rank)
        yield Remark(certain, f"{name[0].upper()}{name[1:]} is slow: {why}.")
    told = {event["rank"]: event for event in run.happened("slow") if "rank" in event}
    for rank, event in told.items():
        count = times(sum(other.get("rank") == rank for other in run.happened("slow")))
        took = f"{event.get('seconds', 0):.3f} s where {event.get('median', 0):.3f} s were usual"
        text = f"While it ran, {named(rank)} was called slow {count}, last at step {event.get('step')}: {took}."
        yield Remark(True, text)
    if failed := run.happened("save_failed"):
        last = f"last at step {failed[-1].get('step')}: {failed[-1].get('why')}"
        yield Remark(True, f"A checkpoint could not be saved, {times(len(failed))}, {last}")
    if refused := run.happened("refused"):
        last = f"last step {refused[-1].get('step')}"
        yield Remark(True, f"Loss or gradient was not finite, and the step refused, {times(len(refused))}, {last}.")
    if empty := run.happened("empty"):
        text = f"A global batch held nothing to learn, {times(len(empty))}, last at step {empty[-1].get('step')}."
        yield Remark(True, text)
    if not run.rows:
        yield Remark(False, "No step has been made.")
    yield from _endings(run)


def _endings(run: Run) -> Iterator[Remark]:
    starts, stops = run.happened("start"), run.happened("stop")
    if len(starts) > len(stops):
        count = len(starts) - len(stops)
        yield Remark(
            False, f"{count} of {counted(len(starts), 'start')} ended without a word: killed, or still running."
        )
    rollbacks = run.happened("rollback")
    if skipping := [event for event in rollbacks if "samples" in event]:
        yield Remark(False, f"Rolled back {times(len(skipping))}; the data around the failure was skipped.")
    if again := len(rollbacks) - len(skipping):
        yield Remark(False, f"Went back {times(again)} because copies differed; the same steps were made again.")
    for event in run.happened("flipped_bit"):
        where = f"rank {event.get('rank')}, host {event.get('host')}"
        yield Remark(True, f"A bit flipped on {where}, by step {event.get('step')}: suspect its memory.")


def when(event: dict[str, Any]) -> str:
    try:
        return datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "no date"


def history(run: Run) -> list[tuple[str, str, str]]:
    """(when, what, details) of everything that happened, for a table."""
    lines = []
    for event in run.events:
        kind = event["event"]
        details = {key: value for key, value in event.items() if key not in ("event", "time")}
        lines.append((when(event), _WORDS.get(kind, kind), _sentence(kind, details)))
    return lines


_WORDS = {
    "start": "start", "ready": "training begins", "stop": "end", "rollback": "rollback", "lost": "steps to make again",
    "refused": "step refused", "empty": "nothing to learn", "slow": "slow rank", "no_answer": "rank lost",
    "save_failed": "checkpoint failed", "damaged": "copies differ", "flipped_bit": "flipped bit",
}  # fmt: skip


def _sentence(kind: str, details: dict[str, Any]) -> str:
    """The details of an event as text; of unknown events, unchanged."""
    try:
        if kind == "start":
            job = f", job {details['job']}" if "job" in details else ""
            return f"{counted(details['ranks'], 'rank')}, rank 0 on {details['host']}{job}"
        if kind == "ready":
            return f"after step {details['step']}"
        if kind == "stop":
            return f"exit code {details['code']}" + (f" after {details['signal']}" if details.get("signal") else "")
        if kind == "rollback":
            what = "the same steps follow again"
            if "samples" in details:
                what = "samples {} to {} left out".format(details["samples"][0], details["samples"][1] - 1)
            return f"step {details['step']} to {details['to_step']}: {details['why']}; {what}"
        if kind == "damaged":
            return f"step {details['step']}: {details['why']}"
        if kind == "flipped_bit":
            return f"rank {details['rank']} on {details['host']}, by step {details['step']}"
        if kind == "lost":
            return f"{details['steps']} after step {details['to_step']}, {details['seconds']:.0f} s of work"
        if kind == "slow":
            took = f"{details['seconds']:.3f} s of work where {details['median']:.3f} s were usual"
            return f"rank {details['rank']} at step {details['step']}: {took}"
        if kind == "no_answer":
            return "rank " + ", ".join(map(str, details["ranks"])) + ": dead or hung"
    except (KeyError, IndexError, TypeError, ValueError):
        pass
    return ", ".join(f"{key} {value}" for key, value in details.items())
