"""How far an evaluation is, and how long it will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megalite.evaluation.service import Advance

_LINE_SECONDS = 30.0


class Progress:
    """Shows each task on standard error; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """A context that yields the function to call with the number of requests that were answered."""
        if self.quiet:
            yield lambda count: None
        elif sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
                row = bar.add_task(name, total=total)
                yield lambda count: bar.advance(row, count)
        else:
            yield _Lines(name, total)


class _Lines:
    """A line at most every half minute."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._began = self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told < _LINE_SECONDS or not self._done:
            return
        self._told = now
        left = timedelta(seconds=round((now - self._began) * (self._total - self._done) / self._done))
        print(f"{self._name}: {self._done:,} of {self._total:,}, {left} left", file=sys.stderr, flush=True)
