"""Worker processes that take shards off a common counter; text never passes between processes."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from megalite.errors import UserError
from megalite.text.preprocess_shard import EncodeOptions, Piece, ShardWriter
from megalite.text.tokenizers import Tokenizer

Job = tuple[Path, Sequence[Piece]]
PLAIN_REPORT_SHARE = 0.1  # without a terminal one line is printed for each tenth


def run_workers(
    jobs: Sequence[Job], tokenizer: Tokenizer, options: EncodeOptions, workers: int, bar: "ProgressBar"
) -> Iterator[int]:
    """Make every shard in `jobs`; yields the position of each as it is finished.

    Raises:
        UserError: what a worker met, or that one died; the others are stopped, finished shards stay.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("fork")  # the tokenizer is loaded once; its memory is shared
    counter = context.Value("q", 0)
    channels: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            receiving, sending = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_work, args=(jobs, tokenizer, options, counter, sending, os.getpid()), daemon=True
            )
            process.start()
            sending.close()
            channels[receiving] = process
        while channels:
            for ready in wait(list(channels)):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except EOFError:
                    _check_exit(channels.pop(ready))
                    continue
                if kind == "read":
                    bar.advance(value)
                elif kind == "done":
                    yield value
                elif kind == "error":
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
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    options: EncodeOptions,
    counter: "multiprocessing.sharedctypes.Synchronized[int]",
    channel: Connection,
    parent: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the parent alone answers it

    def report(size: int) -> None:
        if os.getppid() != parent:  # killed outright: its lock, which this process holds too, must not linger
            os._exit(1)
        channel.send(("read", size))

    try:
        while True:
            with counter.get_lock():
                position = counter.value
                counter.value += 1
            if position >= len(jobs):
                return
            prefix, pieces = jobs[position]
            ShardWriter(prefix, tokenizer, options, report).write(pieces)
            channel.send(("done", position))
    except UserError as error:
        channel.send(("error", str(error)))


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
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
        self._progress.stop()
