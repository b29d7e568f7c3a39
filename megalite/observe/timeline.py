"""The breakdown of a step's time on this rank: compute, waits by mesh axis, reduction, optimizer.

The recorder wraps every operation of the pipeline engine (`Trainer.observe`) and every wait of the mesh's groups
(`Mesh.observe_waits`) in two marks. On CPUs a mark is the host clock; on GPUs it is a CUDA event on the current stream,
read a step later, so measuring never synchronises. Waits inside an operation are subtracted from it, so `forward` and
`backward` are this rank's own compute.

Each rank writes `timeline/rank_N.jsonl`: rows of mean seconds over some steps, and all operations of a few sampled
steps, in seconds relative to the all-reduce of the step's norm, which ends at the same moment on all ranks whatever
their clocks say. The file stays small: when it is full, neighbouring rows are merged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megalite.mesh import AXES, Mesh
from megalite.observe.lines import LineFile, read_lines
from megalite.schedule.ops import COLLECTIVES, COMPUTE, Op

log = logging.getLogger("megalite")

TIMELINE = "timeline"
"""Folder in the run directory."""
PHASES = (
    "data", "forward", "backward", "wait_pipeline", "wait_tensor", "wait_context", "wait_expert", "reduce",
    "wait_others", "optimizer", "wait_optimizer", "gather", "rollout", "reward", "score", "other",
)  # fmt: skip
"""The parts of a step. `wait_pipeline`, `wait_tensor`, `wait_context` and `wait_expert` are exposed communication along
these axes; `reduce` is what the reduction of gradients takes beside them, `wait_others` the agreement on loss and norm,
`wait_optimizer` the optimizer's own exchanges (Muon's), `gather` the sharing of updated parameters, `other` what is
left. A policy's step begins with the `rollout` of answers, their `reward` and their `score` by policy, reference and
critic, with all computing and waiting in these."""

_WAIT_PHASES: dict[tuple[str, ...], str] = {
    ("pp",): "wait_pipeline",
    ("tp",): "wait_tensor",
    ("cp",): "wait_context",
    ("ep",): "wait_expert",
}
_OP_PHASES = {"F": "forward", "B": "backward", "I": "backward", "W": "backward", "R": "reduce", "T": "reduce"}

_SAMPLE_STEPS = 25
"""Interval of sampled steps, whose operations are all kept; the third step of a start is sampled too."""
_FIRST_SAMPLE = 3
_KEPT_SAMPLES = 3
_WINDOW_SECONDS = (1.0, 60.0)
"""Minimum and maximum time that one row averages over; in between, a fiftieth of the time since the start."""
_WINDOW_SHARE = 0.02
_LIMIT_BYTES = 1 << 20


class Clock(Protocol):
    """Records marks and measures the seconds between two of them."""

    delay: int
    """Number of steps after which marks can be read without waiting."""

    def mark(self) -> Any: ...

    def seconds(self, first: Any, second: Any) -> float: ...

    def free(self, marks: list[Any]) -> None: ...


class HostClock:
    """For CPUs, where operations are complete when they return."""

    delay = 0

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def free(self, marks: list[float]) -> None:
        return None


class StreamClock:
    """For GPUs: events on the current stream. Every step ends with a host sync (the norm), so the events of the
    previous step have completed."""

    delay = 1

    def __init__(self) -> None:
        self._pool: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1e3

    def free(self, marks: list[torch.cuda.Event]) -> None:
        self._pool.extend(marks)


def clock_for(device: torch.device) -> Clock:
    return StreamClock() if device.type == "cuda" else HostClock()


@dataclass
class _Span:
    """A timed part of a step, with the waits inside it; `op` is None for parts that are not pipeline operations."""

    phase: str
    op: Op | None
    start: Any
    end: Any = None
    waits: list[tuple[tuple[str, ...], Any, Any]] = field(default_factory=list)


@dataclass
class _Step:
    """The marks of one step; `loose` are waits outside any span."""

    number: int
    start: Any
    full: bool
    end: Any = None
    spans: list[_Span] = field(default_factory=list)
    loose: list[tuple[tuple[str, ...], Any, Any]] = field(default_factory=list)

    def marks(self) -> Iterator[Any]:
        yield from (self.start, self.end)
        for span in self.spans:
            yield from (span.start, span.end)
        for _, first, second in (*self.loose, *(wait for span in self.spans for wait in span.waits)):
            yield from (first, second)


class Recorder:
    """Times this rank's steps; `step` around each, `phase` around its parts outside the engine."""

    def __init__(self, mesh: Mesh, run_dir: str | Path, clock: Clock | None = None) -> None:
        self.mesh = mesh
        self.clock = clock or clock_for(mesh.device)
        self.naming = False
        """Name every operation for torch's profiler and for NVTX."""
        self.work_seconds: deque[float] = deque(maxlen=256)
        """Own work, without waits, of the latest steps in which every wait was timed."""
        self.optimizer_seconds = 0.0
        """Of the update, with the optimizer's exchanges, in the latest step whose marks have been read."""
        self._step: _Step | None = None
        self._span: _Span | None = None
        self._steps = 0
        self._pending: deque[_Step] = deque()
        self._file = TimelineFile(mesh, Path(run_dir))
        mesh.observe_waits(self._wait)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        self._steps += 1
        full = number % _SAMPLE_STEPS == 0 or self._steps == _FIRST_SAMPLE
        step = self._step = _Step(number, self.clock.mark(), full)
        try:
            yield
        finally:
            self._step = self._span = None
        step.end = self.clock.mark()
        self._pending.append(step)
        while len(self._pending) > self.clock.delay:
            self._resolve(self._pending.popleft())

    @contextlib.contextmanager
    def phase(self, name: str, op: Op | None = None) -> Iterator[None]:
        """Time a part of the current step; parts inside it are not told apart."""
        with self._named(str(op or name)) if self.naming else nullcontext():
            if self._step is None or self._span is not None:
                yield
                return
            span = self._span = _Span(name, op, self.clock.mark())
            yield
            span.end = self.clock.mark()
            self._step.spans.append(span)
            self._span = None

    def observe(self, op: Op) -> AbstractContextManager[None]:
        """The engine's observer. On GPUs, sends and receives return at once and transfer in the background, so only
        their waits are timed; on CPUs the whole call is."""
        if op.kind in _OP_PHASES:
            return self.phase(_OP_PHASES[op.kind], op)
        if self.clock.delay == 0:
            return self.phase("wait_pipeline", op)
        return self._named(str(op)) if self.naming else nullcontext()

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(RuntimeError):  # a build without NVTX, or a profiler that is stopping
                stack.enter_context(torch.profiler.record_function(name))
                if self.mesh.device.type == "cuda":
                    stack.enter_context(torch.cuda.nvtx.range(name))
            yield

    def _wait(self, axes: tuple[str, ...]) -> AbstractContextManager[None]:
        step = self._step
        # A step has thousands of waits along the tensor axis: on GPUs they are timed in sampled steps only.
        if step is None or (axes == ("tp",) and self.clock.delay and not step.full):
            return nullcontext()
        return self._timed_wait(step, axes)

    @contextlib.contextmanager
    def _timed_wait(self, step: _Step, axes: tuple[str, ...]) -> Iterator[None]:
        start = self.clock.mark()
        yield
        waits = step.loose if self._span is None else self._span.waits
        waits.append((axes, start, self.clock.mark()))

    def _resolve(self, step: _Step) -> None:
        """Read the marks of a completed step."""
        seconds = _break_down(step, self.clock)
        self.optimizer_seconds = seconds["optimizer"] + seconds["wait_optimizer"]
        if step.full or not self.clock.delay:
            self.work_seconds.append(own_work(seconds))
        self._file.add(step.number, seconds)
        if step.full:
            self._file.add_operations(step.number, *_operations(step, self.clock))
        self.clock.free(list(step.marks()))

    def close(self) -> None:
        """Write buffered rows; steps whose marks may not have completed are dropped."""
        self._pending.clear()
        self._file.close()


def _agreement(step: _Step) -> tuple[Any, Any]:
    """The marks around the wait for the step's global all-reduce; with one rank, the end of the last operation."""
    for axes, start, end in reversed(step.loose):
        if axes == AXES:
            return start, end
    operations = [span for span in step.spans if span.op is not None]
    end = operations[-1].end if operations else step.end
    return end, end


def _break_down(step: _Step, clock: Clock) -> dict[str, float]:
    """Seconds of each of PHASES."""
    # The phases must add up to the step, so every wait is subtracted from the span around it. A wait in forward is for
    # ZeRO-3 weights, one in backward for a gradient reduction, unless its axis says otherwise. After the agreement
    # waits are for all-gathers of updated parameters, or, where tensor ranks take part, for the optimizer's own
    # exchanges; before it, waits outside any span are for other ranks.
    seconds = dict.fromkeys(PHASES, 0.0)
    for span in step.spans:
        whole = clock.seconds(span.start, span.end)
        if span.phase in ("forward", "backward"):
            for axes, start, end in span.waits:
                waited = clock.seconds(start, end)
                seconds[_WAIT_PHASES.get(axes, "gather" if span.phase == "forward" else "reduce")] += waited
                whole -= waited
        seconds[span.phase] += whole
    agreed_from, agreed = _agreement(step)
    seconds["wait_others"] = clock.seconds(agreed_from, agreed)
    seconds["optimizer"] = clock.seconds(agreed, step.end)
    for axes, start, end in step.loose:
        waited = clock.seconds(start, end)
        if clock.seconds(agreed, start) >= 0.0:
            seconds["wait_optimizer" if "tp" in axes else "gather"] += waited
            seconds["optimizer"] -= waited
        elif axes != AXES:
            seconds[_WAIT_PHASES.get(axes, "wait_others")] += waited
    seconds["other"] = max(0.0, clock.seconds(step.start, step.end) - sum(seconds.values()))
    return seconds


def _operations(step: _Step, clock: Clock) -> tuple[list[Any], list[Any]]:
    """[operation, start, end] and [axes, start, end] of a step, in seconds relative to the end of its all-reduce."""
    _, agreed = _agreement(step)

    def moments(start: Any, end: Any) -> tuple[float, float]:
        return round(clock.seconds(agreed, start), 6), round(clock.seconds(agreed, end), 6)

    timed = (span for span in step.spans if span.op is not None and span.op.kind in COMPUTE | COLLECTIVES)
    operations = [[str(span.op), *moments(span.start, span.end)] for span in timed]
    waits = [
        ["x".join(axes), *moments(start, end)]
        for span in step.spans
        for axes, start, end in span.waits
        if axes == ("pp",)
    ]
    return operations, waits


class TimelineFile:
    """One rank's rows: {first, last, steps, seconds: {phase: mean}, memory_gib} and {step, operations, waits}."""

    def __init__(self, mesh: Mesh, run_dir: Path) -> None:
        self._mesh = mesh
        self._file = LineFile(run_dir / TIMELINE / f"rank_{mesh.rank:05d}.jsonl", f"rank {mesh.rank}")
        self._size: int | None = None
        self._began = self._last = time.monotonic()
        self._row: dict[str, Any] | None = None

    def add(self, step: int, seconds: dict[str, float]) -> None:
        row = {"first": step, "last": step, "steps": 1, "seconds": seconds}
        self._row = row if self._row is None else merge(self._row, row)
        now = time.monotonic()
        shortest, longest = _WINDOW_SECONDS
        if now - self._last >= min(max(shortest, _WINDOW_SHARE * (now - self._began)), longest):
            self._last = now
            self._flush()

    def add_operations(self, step: int, operations: list[Any], waits: list[Any]) -> None:
        self._write({"step": step, "operations": operations, "waits": waits})

    def _flush(self) -> None:
        if self._row is not None:
            rounded = {name: round(value, 6) for name, value in self._row["seconds"].items()}
            self._write({**self._row, "seconds": rounded, "memory_gib": round(memory_gib(self._mesh.device), 4)})
            self._row = None

    def _write(self, row: dict[str, Any]) -> None:
        if self._size is None:  # the first row of this start is preceded by a header that names the rank
            self._size = self._file.path.stat().st_size if self._file.path.exists() else 0
            self._write(self._head())
        self._file.write(row)
        self._size += len(str(row))
        if self._size > _LIMIT_BYTES:
            rows = compact(read_lines(self._file.path))
            self._file.replace(rows)
            self._size = sum(len(str(row)) for row in rows)

    def _head(self) -> dict[str, Any]:
        mesh = self._mesh
        who = {"rank": mesh.rank, "host": socket.gethostname(), "device": str(mesh.device), "pid": os.getpid()}
        return {**who, "shape": dict(zip(AXES, mesh.shape)), **mesh.coordinate}

    def close(self) -> None:
        self._flush()
        self._file.close()


def own_work(seconds: Mapping[str, float]) -> float:
    """This rank's own work in seconds: all phases except waits and data-parallel communication."""
    others = ("reduce", "gather")
    return sum(value for name, value in seconds.items() if not name.startswith("wait") and name not in others)


def merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The mean of two rows of seconds, weighted by their steps."""
    steps = earlier["steps"] + later["steps"]
    seconds = {
        name: (earlier["seconds"].get(name, 0.0) * earlier["steps"] + value * later["steps"]) / steps
        for name, value in later["seconds"].items()
    }
    memory = [row["memory_gib"] for row in (earlier, later) if "memory_gib" in row]
    merged = {"first": earlier["first"], "last": later["last"], "steps": steps, "seconds": seconds}
    return merged | ({"memory_gib": max(memory)} if memory else {})


def current(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of seconds, without those of steps that were repeated after a restart."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if "seconds" in row:
            while kept and kept[-1]["last"] >= row["first"]:
                kept.pop()
            kept.append(row)
    return kept


def compact(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge neighbouring rows of seconds into half as many; keep the newest header and the newest operations."""
    means = current(rows)
    couples = (means[at : at + 2] for at in range(0, len(means), 2))
    pairs = [merge(*couple) if len(couple) == 2 else couple[0] for couple in couples]
    heads = [row for row in rows if "rank" in row]
    samples = [row for row in rows if "operations" in row]
    return [*heads[-1:], *pairs, *samples[-_KEPT_SAMPLES:]]


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on its GPU, or resident on CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
