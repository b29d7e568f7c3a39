"""How the offline text programs share out their work: units of input, worker processes, and notes of what is done.

A unit is a compressed file, a byte range of a plain one, or several small files. Units depend on the input alone,
never on the number of workers, so a program's output does not either. When a unit is done a small JSON note says so,
and a later call of the same job only reads the note.
"""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as Row
from rich.text import Text

from megalite.errors import UserError
from megalite.files import TEMPORARY_SUFFIX, write_atomically, write_errors_named
from megalite.text.formats import can_split

UNIT_BYTES = 64 << 20  # a plain file is cut into ranges of this size
PACK_BYTES = 4 << 20  # small files that follow each other share a unit up to this size
DONE_DIRECTORY = ".progress"
PLAIN_REPORT_SHARE = 0.1  # without a terminal one line is printed for each tenth

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int], None]


@dataclass(frozen=True)
class FilePart:
    """The lines of a file that begin in its bytes [start, end); the whole file where `whole`."""

    path: str
    start: int
    end: int
    whole: bool

    def __str__(self) -> str:
        return self.path if self.start == 0 else f"{self.path}@{self.start}"

    @property
    def byte_range(self) -> tuple[int, int] | None:
        return None if self.whole else (self.start, self.end)


@dataclass(frozen=True)
class Unit:
    """What one task reads, in order, and writes to one shard."""

    number: int
    pieces: tuple[FilePart, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def shard_name(self) -> str:
        """File name of the shard made from this unit; the number keeps input order and makes equal stems differ."""
        return f"{self.number:05d}_{Path(self.pieces[0].path).name.split('.')[0]}.jsonl.zst"


def plan_units(paths: Sequence[Path], unit_bytes: int = UNIT_BYTES, pack_bytes: int = PACK_BYTES) -> list[Unit]:
    """Split the input into units, in input order: large files into ranges if possible, small ones packed together."""
    units: list[Unit] = []
    pack: list[FilePart] = []
    packed = 0  # bytes in the pack

    def close(pieces: Sequence[FilePart]) -> None:
        if pieces:
            units.append(Unit(len(units), tuple(pieces)))

    for path in paths:
        size = path.stat().st_size
        if size > unit_bytes and can_split(path):
            close(pack)
            pack, packed = [], 0
            for start in range(0, size, unit_bytes):
                close([FilePart(str(path), start, min(size, start + unit_bytes), whole=False)])
            continue
        if pack and packed + size > pack_bytes:
            close(pack)
            pack, packed = [], 0
        pack.append(FilePart(str(path), 0, size, whole=True))
        packed += size
    close(pack)
    return units


def fingerprint(units: Sequence[Unit], settings: object) -> str:
    """A short hash of the input files (name, size, time of change), units and settings: one run's identity."""
    files = {}
    for path in {piece.path: None for unit in units for piece in unit.pieces}:
        status = os.stat(path)
        files[path] = [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    described = [[asdict(unit) for unit in units], list(files.values()), settings]
    return hashlib.sha256(orjson.dumps(described, option=orjson.OPT_NON_STR_KEYS)).hexdigest()[:16]


# ---- what is done


def known_fingerprint(directory: Path) -> str | None:
    """The identity of the run whose notes a directory holds, or None."""
    try:
        return orjson.loads((directory / DONE_DIRECTORY / "run.json").read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def begin_notes(directory: Path, identity: str) -> None:
    """Mark a directory as that of this run, or remove what an interrupted one left there half written."""
    marker = directory / DONE_DIRECTORY / "run.json"
    with write_errors_named(directory):
        if known_fingerprint(directory) != identity:
            marker.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(marker, orjson.dumps({"fingerprint": identity}))
        for half_written in directory.rglob(f".*{TEMPORARY_SUFFIX}"):
            half_written.unlink(missing_ok=True)


class UnitTask(Protocol):
    """What every task of one unit has; the output directory belongs to the whole run."""

    @property
    def unit(self) -> Unit: ...

    @property
    def output(self) -> Path: ...


AnyUnitTask = TypeVar("AnyUnitTask", bound=UnitTask)
UnitWork = Callable[..., dict[str, Any]]


def note_path(task: UnitTask, stage: str) -> Path:
    return task.output / DONE_DIRECTORY / f"{stage}-{task.unit.number:05d}.json"


def noted(stage: str) -> Callable[[UnitWork], UnitWork]:
    """Of a function that does a unit's work: note its result (JSON) when it is done; a later call only reads the note.

    Args:
        stage: the name of this work among all that is done to a unit in one output directory.
    """

    def decorate(work: UnitWork) -> UnitWork:
        @functools.wraps(work)
        def work_once(task: AnyUnitTask, *arguments: Any) -> dict[str, Any]:
            note = note_path(task, stage)
            if note.is_file():
                return orjson.loads(note.read_bytes())
            result = work(task, *arguments)
            with write_errors_named(note):
                write_atomically(note, orjson.dumps(result))
            return result

        return work_once

    return decorate


# ---- workers


def map_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, title: str, weights: Sequence[int]
) -> list[Result]:
    """`[function(task) for task in tasks]` in up to `workers` processes, with progress on a terminal.

    Args:
        weights: bytes that each task stands for, for the progress display.

    Raises:
        UserError: what the function raised, or a worker was killed (nearly always for want of memory).
    """
    results: list[Any] = [None] * len(tasks)
    with ProgressBar(sum(weights), title, shown=sys.stderr.isatty()) as bar:
        for position, result in run_tasks(lambda task, report: function(task), tasks, workers, bar.advance):
            results[position] = result
            bar.advance(weights[position])
    return results


def run_tasks(
    function: Callable[[Task, Report], Result], tasks: Sequence[Task], workers: int, report: Report
) -> Iterator[tuple[int, Result]]:
    """`function(task, report)` for every task, in up to `workers` processes; each position and result as it is done.

    Processes are forked: tasks and what they refer to (a tokenizer) are shared with them, and so are held locks, which
    last until the last worker has stopped. One worker is this process itself. `report` adds to the bytes that are done.

    Raises:
        UserError: what the function raised, or that a worker died; the others are stopped.
    """
    if min(workers, len(tasks)) <= 1:
        for position, task in enumerate(tasks):
            yield position, _in_bounds(function, task, report)
        return
    context = multiprocessing.get_context("fork")
    positions = iter(range(len(tasks)))
    channels: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(function, tasks, theirs), daemon=True)
            process.start()
            theirs.close()
            channels[ours] = process
            ours.send(next(positions))
        while channels:
            for ready in wait(list(channels)):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except EOFError:
                    _check_exit(channels.pop(ready))
                    continue
                if kind == "read":
                    report(value)
                elif kind == "done":
                    with contextlib.suppress(BrokenPipeError):  # it has died since: its end is read next
                        ready.send(next(positions, None))
                    yield value
                else:
                    raise UserError(value)
    finally:
        for process in channels.values():
            process.terminate()
        for process in channels.values():
            process.join()


def _check_exit(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        died = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        remedy = "; likely out of memory: use fewer --workers" if process.exitcode == -signal.SIGKILL else ""
        raise UserError(f"a worker process ended with {died}{remedy}; the same command goes on where it stopped")


def _work(
    function: Callable[[Task, Report], Result],
    tasks: Sequence[Task],
    channel: Connection,
) -> None:
    """Do the tasks whose positions come, until None does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent alone answers it
    signal.signal(signal.SIGTERM, _stop)  # the half-written file goes, which death by the signal itself would leave
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while (position := channel.recv()) is not None:
            result = _in_bounds(function, tasks[position], lambda size: channel.send(("read", size)))
            channel.send(("done", (position, result)))
    except UserError as error:
        channel.send(("error", str(error)))


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_bounds(function: Callable[[Task, Report], Result], task: Task, report: Report) -> Result:
    try:
        return function(task, report)
    except MemoryError:
        raise UserError("not enough memory: use fewer --workers, or a smaller --max-record-bytes") from None


class _Speed(ProgressColumn):
    def render(self, task: Row) -> Text:
        return Text(f"{(task.speed or 0) / 1e6:6.1f} MB/s")


class ProgressBar:
    """Bytes of input done, MB/s and time left: a bar on a terminal, elsewhere a line for every tenth, on stderr."""

    def __init__(self, total: int, name: str, shown: bool) -> None:
        self._total = max(total, 1)
        self._name = name
        self._done = 0
        self._next_line = PLAIN_REPORT_SHARE
        self._lines = shown and not sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _Speed(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            disable=not shown or self._lines,
        )
        self._task = self._progress.add_task(name, total=self._total)

    def skip(self, size: int) -> None:
        """Count what an earlier run has done: no speed follows from it."""
        self._done += size
        self._progress.reset(self._task, completed=self._done, total=self._total)

    def advance(self, size: int) -> None:
        self._done += size
        self._progress.advance(self._task, size)
        if self._lines and self._done >= self._next_line * self._total:
            speed = (self._progress.tasks[0].speed or 0) / 1e6
            left = self._progress.tasks[0].time_remaining
            print(
                f"{self._name}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {speed:.1f} MB/s,"
                f" {'?' if left is None else f'{left:.0f}'} s left",
                file=sys.stderr,
                flush=True,
            )
            self._next_line = self._done / self._total + PLAIN_REPORT_SHARE

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a closed terminal ends no work
            self._progress.stop()
