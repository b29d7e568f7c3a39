"""How the offline text programs share out their work: input units, the shards made from them, worker processes.

A unit is a compressed file, a byte range of a plain one, or several small files. Units depend on the input alone,
never on the number of workers, so a program's output does not either. Each unit is written to its own shard under a
temporary name and is renamed when it is complete; a small JSON note then tells a later call that it is done.
"""

import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import orjson
import zstandard

from megalite.errors import UserError
from megalite.text.readers import DAMAGED, BadRecord, Document, can_split, read_documents

UNIT_BYTES = 64 << 20  # a plain file is cut into ranges of this size
PACK_BYTES = 4 << 20  # small files that follow each other share a unit up to this size
DONE_DIRECTORY = ".progress"
REJECTED_DIRECTORY = "rejected"
PARTIAL = ".partial-"  # begins the names of files that are not complete
EXAMPLES = 5

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin in its bytes [start, end); the whole file where `whole`."""

    path: str
    start: int
    end: int
    whole: bool

    def __str__(self) -> str:
        return self.path if self.start == 0 else f"{self.path}@{self.start}"


@dataclass(frozen=True)
class Unit:
    """What one task reads, in order, and writes to one shard."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def shard_name(self) -> str:
        """File name of the shard made from this unit; the number keeps input order and makes equal stems differ."""
        return f"{self.number:05d}_{Path(self.pieces[0].path).name.split('.')[0]}.jsonl.zst"


def plan_units(paths: Sequence[Path], unit_bytes: int = UNIT_BYTES, pack_bytes: int = PACK_BYTES) -> list[Unit]:
    """Cut the input into units, in input order: large files into ranges where they allow it, small ones packed."""
    units: list[Unit] = []
    pack: list[Piece] = []

    def close(pieces: Sequence[Piece]) -> None:
        if pieces:
            units.append(Unit(len(units), tuple(pieces)))

    for path in paths:
        size = path.stat().st_size
        if size > unit_bytes and can_split(path):
            close(pack)
            pack = []
            for start in range(0, size, unit_bytes):
                close([Piece(str(path), start, min(size, start + unit_bytes), whole=False)])
            continue
        if pack and sum(piece.end for piece in pack) + size > pack_bytes:
            close(pack)
            pack = []
        pack.append(Piece(str(path), 0, size, whole=True))
    close(pack)
    return units


@dataclass
class Unusable:
    """Records that gave no document, counted by reason, with the first few in words."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, record: BadRecord) -> None:
        self.counts[record.reason] = self.counts.get(record.reason, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(record))

    def include(self, other: dict[str, Any]) -> None:
        """Add the counts of another unit, given as `asdict` made them."""
        for reason, count in other["counts"].items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples = (self.examples + other["examples"])[:EXAMPLES]

    def check(self, usable: int, max_ratio: float, allow_damaged: bool) -> None:
        """Refuse input of which too much cannot be used.

        Raises:
            UserError: no record is usable, or more than `max_ratio` of them are not, or a file is damaged.
        """
        bad = sum(self.counts.values())
        if not bad and not usable:
            raise UserError("--input holds no documents: give files with text")
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
        if self.counts.get(DAMAGED) and not allow_damaged:
            raise UserError(
                f"damaged input ({self._example(DAMAGED)}): replace the file, or accept with --allow-damaged"
            )
        if bad and bad > max_ratio * (bad + usable):
            remedy = "mend the input or --key, or raise --max-bad-ratio"
            raise UserError(
                f"{bad} of {bad + usable} records cannot be used ({reasons}), first {self.examples[0]}; {remedy}"
            )

    def _example(self, reason: str) -> str:
        return next(
            (example for example in self.examples if f": {reason}: " in example), f"{self.counts[reason]} files"
        )


def read_unit(unit: Unit, key: str, unusable: Unusable, with_extra: bool = True) -> Iterator[tuple[int, Document]]:
    """The documents of a unit in order, each with the number of its piece; bad records go to `unusable`."""
    for number, piece in enumerate(unit.pieces):
        byte_range = None if piece.whole else (piece.start, piece.end)
        for document in read_documents(piece.path, key, byte_range, unusable.add, with_extra=with_extra):
            yield number, document


def fingerprint(units: Sequence[Unit], settings: object) -> str:
    """A short hash of the input files (name, size, time of change), units and settings: one run's identity."""
    files = {}
    for path in {piece.path: None for unit in units for piece in unit.pieces}:
        status = os.stat(path)
        files[path] = [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    described = [[asdict(unit) for unit in units], list(files.values()), settings]
    return hashlib.sha256(orjson.dumps(described, option=orjson.OPT_NON_STR_KEYS)).hexdigest()[:16]


def open_output(directory: Path, identity: str) -> None:
    """Make the output directory, or accept one that an interrupted run with the same input and settings left.

    Raises:
        UserError: the directory holds something else, which is never overwritten.
    """
    marker = directory / DONE_DIRECTORY / "run.json"
    try:
        if directory.exists() and any(directory.iterdir()):
            known = orjson.loads(marker.read_bytes())["fingerprint"] if marker.is_file() else None
            if known != identity:
                why = "was made from other input or settings" if known else "holds other files"
                raise UserError(f"--output {directory} {why}: give a new directory, or remove it first")
            for half_written in directory.rglob(f"{PARTIAL}*"):
                half_written.unlink()
            return
        marker.parent.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"--output {directory} is not a directory: give the name of a directory") from None
    except PermissionError as error:
        raise UserError(f"--output {directory} cannot be used ({error.strerror}): choose a directory you own") from None
    write_atomically(marker, orjson.dumps({"fingerprint": identity}))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file so that its final name never shows less than all of it."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same suffix) that becomes `path`, synced to disk, when the block ends well."""
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): free some space or choose another --output"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class UnitTask(Protocol):
    """What every task of one unit has; the output directory belongs to the whole run."""

    @property
    def unit(self) -> Unit: ...

    @property
    def output(self) -> Path: ...


AnyUnitTask = TypeVar("AnyUnitTask", bound=UnitTask)


def noted(stage: str) -> Callable[[Callable[[AnyUnitTask], dict[str, Any]]], Callable[[AnyUnitTask], dict[str, Any]]]:
    """Of a function that does a unit's work: note its result (JSON) when it is done; a later call only reads the note.

    Args:
        stage: the name of this work among all that is done to a unit in one output directory.
    """

    def decorate(work: Callable[[AnyUnitTask], dict[str, Any]]) -> Callable[[AnyUnitTask], dict[str, Any]]:
        @functools.wraps(work)
        def work_once(task: AnyUnitTask) -> dict[str, Any]:
            note = task.output / DONE_DIRECTORY / f"{stage}-{task.unit.number:05d}.json"
            if note.is_file():
                return orjson.loads(note.read_bytes())
            result = work(task)
            write_atomically(note, orjson.dumps(result))
            return result

        return work_once

    return decorate


class ShardWriter:
    """Writes records as zstd-compressed JSON lines; the final name appears only when the block ends without an error.

    Values that JSON does not know (bytes and decimals of a parquet file, say) are written as strings.
    """

    def __init__(self, path: Path, level: int = 3) -> None:
        self.path = path
        self._frame = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            file = stack.enter_context(open(temporary, "wb"))
            self._stream = stack.enter_context(self._frame.stream_writer(file))
            self._exit = stack.pop_all()
        return self

    def write(self, record: dict[str, Any]) -> None:
        self._stream.write(orjson.dumps(record, default=_as_text, option=orjson.OPT_APPEND_NEWLINE))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._exit.__exit__(kind, error, trace)


@contextlib.contextmanager
def open_shards(output: Path, unit: Unit, keep_rejected: bool) -> Iterator[tuple[ShardWriter, ShardWriter | None]]:
    """The unit's shard and, where `keep_rejected`, the one of what is left out of it, in a directory of its own."""
    with contextlib.ExitStack() as stack:
        shard, rejected = stack.enter_context(ShardWriter(output / unit.shard_name)), None
        if keep_rejected:
            (output / REJECTED_DIRECTORY).mkdir(exist_ok=True)
            rejected = stack.enter_context(ShardWriter(output / REJECTED_DIRECTORY / unit.shard_name))
        yield shard, rejected


def _as_text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def map_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, title: str, weights: Sequence[int]
) -> list[Result]:
    """`[function(task) for task in tasks]` in up to `workers` processes, with progress on a terminal.

    Args:
        function: a module-level function; it runs in this process where one worker is enough.
        weights: bytes that each task stands for, for the progress display.

    Raises:
        UserError: what the function raised, or a worker was killed (nearly always for want of memory).
    """
    results: list[Result | None] = [None] * len(tasks)
    with _progress(title, sum(weights)) as advance:
        if workers <= 1 or len(tasks) <= 1:
            for index, task in enumerate(tasks):
                results[index] = function(task)
                advance(weights[index])
            return results  # type: ignore[return-value]
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_follow_parent)
        try:
            futures = {pool.submit(function, task): index for index, task in enumerate(tasks)}
            for future in as_completed(futures):
                index = futures[future]
                results[index] = future.result()
                advance(weights[index])
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably for want of memory: give fewer --workers and call again; "
                "finished parts are kept"
            ) from None
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results  # type: ignore[return-value]


def _follow_parent() -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the parent; end when the parent ends, even by a kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes with speed and time left, on standard error if that is a terminal; otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: Iterable[Any] = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.update(task, advance=amount)
