"""What an evaluation found: one line for a task, one for each request, and a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megalite.errors import UserError
from megalite.files import PendingFile, atomic_file, write_errors_named


@dataclass(frozen=True)
class Result:
    """A task's score, mean of `n` requests, with its standard error (None for one request).

    `more` holds further numbers of the line; `records` one object for each request: task, id, prompt, answer, gold,
    correct, and `logprobs` of the choices or the generated `text`.
    """

    task: str
    score: float
    stderr: float | None
    n: int
    shots: int
    more: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()

    def line(self) -> dict[str, Any]:
        first = {"task": self.task, "score": self.score, "stderr": self.stderr, "n": self.n, "shots": self.shots}
        return first | dict(self.more)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, from the sample's variance."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def pooled_error(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard error of the mean over all groups together, from the variances within them."""
    total, freedom = sum(map(len, groups)), sum(len(group) - 1 for group in groups)
    if freedom < 1:
        return None
    squares = sum(sum((value - sum(group) / len(group)) ** 2 for value in group) for group in groups)
    return math.sqrt(squares / freedom / total)


def check_output(path: Path | None) -> None:
    """Raise UserError if the file cannot be written: before hours of work, not after."""
    if path is None:
        return
    with write_errors_named(path):
        if path.is_dir():
            raise UserError(f"--output {path} is a directory; name a file")
        pending = PendingFile(path)
        try:
            pending.file.write(b"\n")
            pending.file.flush()
            os.fsync(pending.file.fileno())
        finally:
            pending.abort()


def write_records(path: Path, results: Sequence[Result]) -> None:
    """One JSON line for each request of all tasks."""
    with write_errors_named(path), atomic_file(path) as file:
        for result in results:
            for record in result.records:
                file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One more line: the mean of the tasks' scores, each counted once."""
    scores = {line["task"]: line["score"] for line in lines}
    first = {"task": "all", "score": sum(scores.values()) / len(scores), "stderr": None}
    return first | {"n": sum(line["n"] for line in lines), "shots": None, "scores": scores}


def show_table(results: Sequence[Result]) -> None:
    """Tasks with their scores, on standard error: standard output holds JSON alone."""
    made = Table("task", box=None, header_style="bold")
    for column in ("score", "± stderr", "n", "shots"):
        made.add_column(column, justify="right")
    for result in results:
        error = "" if result.stderr is None else f"{result.stderr:.4f}"
        made.add_row(result.task, f"{result.score:.4f}", error, f"{result.n:,}", str(result.shots))
        for name, (score, n) in result.more.get("subjects", {}).items():
            made.add_row(f"  {name}", f"{score:.4f}", "", f"{n:,}", "")
    Console(stderr=True).print(made)
