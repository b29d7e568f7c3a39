"""What evaluations found, of one checkpoint or several: a picture and a table.

The files hold the lines that tools/evaluate.py prints: `evaluate.py mmlu … >> scores.jsonl`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megalite.errors import UserError
from megalite.observe.lines import parse_line
from megalite.observe.metrics import number, whole
from megalite.report.style import FAINT, RUNS, WIDE, new_figure, plain
from megalite.text.foreign import read_small_file

CHANCE = {"mmlu": 0.25, "local_mmlu": 0.25}
"""What guessing scores."""

_LARGEST_FILE = 64 << 20
_STEP = re.compile(r"step_(\d+)")
_LINES_FROM = 3
"""So many steps of one run are a line over the steps; fewer are bars."""


@dataclass(frozen=True)
class Score:
    """One line: a task's score at a checkpoint. `name` is the checkpoint's, as short as it is unique."""

    name: str
    task: str
    score: float
    stderr: float | None
    n: int
    shots: int | None

    @property
    def step(self) -> int | None:
        found = _STEP.search(self.name)
        return int(found[1]) if found else None

    @property
    def run(self) -> str:
        """The name without its step."""
        return _STEP.sub("", self.name).replace("/checkpoints", "").strip("/") or "run"


def read_scores(paths: Sequence[Path]) -> list[Score]:
    """The scores of all files; of several of one task at one checkpoint the last. Raises UserError."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        try:
            lines = read_small_file(path, _LARGEST_FILE).splitlines()
        except OSError as error:
            raise UserError(f"--scores {path}: cannot be read ({error.strerror})") from error
        for place, line in enumerate(lines, 1):
            row = _row(line)
            if row is None:
                raise UserError(f"--scores {path}, line {place}: not a line of tools/evaluate.py with task and score")
            if row["task"] != "all":
                rows[str(row.get("checkpoint", path.stem)), row["task"]] = row
    names = _short({checkpoint for checkpoint, _ in rows})
    return [
        Score(names[checkpoint], task, float(row["score"]), row.get("stderr"), row.get("n", 0), row.get("shots"))
        for (checkpoint, task), row in rows.items()
    ]


def _row(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None for one that cannot be drawn."""
    row = parse_line(line)
    if row is None or not isinstance(row.get("task"), str) or number(row.get("score")) is None:
        return None
    stderr, shots = row.get("stderr"), row.get("shots")
    if stderr is not None and (number(stderr) is None or stderr < 0):
        return None
    counted = whole(row.get("n", 0)) is not None and (shots is None or whole(shots) is not None)
    return row if counted else None


def _short(checkpoints: set[str]) -> dict[str, str]:
    """The shortest ends of the paths that differ."""
    depth = 1
    while depth < 32 and len({"/".join(Path(name).parts[-depth:]) for name in checkpoints}) < len(checkpoints):
        depth += 1
    return {name: "/".join(Path(name).parts[-depth:]) or name for name in checkpoints}


def draw_scores(scores: Sequence[Score]) -> Figure | None:
    """Each task's scores with their standard errors: over the steps of a run, or side by side."""
    if not scores:
        return None
    figure, axes = new_figure(WIDE)
    steps = {one.step for one in scores}
    if None not in steps and len(steps) >= _LINES_FROM:
        _lines(axes, scores)
    else:
        _bars(axes, scores)
    axes.set_title("Scores")
    axes.set_ylim(0, max(1e-3, max(one.score + (one.stderr or 0) for one in scores) * 1.15))
    axes.legend(loc="best")
    return figure


def _lines(axes: Axes, scores: Sequence[Score]) -> None:
    series = list(dict.fromkeys((one.run, one.task) for one in scores))
    several = len({run for run, _ in series}) > 1
    for index, (run, task) in enumerate(series):
        points = sorted(
            (one.step or 0, one.score, one.stderr or 0) for one in scores if (one.run, one.task) == (run, task)
        )
        label = f"{plain(task)}, {plain(run)}" if several else plain(task)
        places, heights, errors = zip(*points)
        axes.errorbar(places, heights, errors, marker="o", markersize=4, color=RUNS[index % len(RUNS)], label=label)
    axes.set_xlabel("step")


def _bars(axes: Axes, scores: Sequence[Score]) -> None:
    tasks, names = (list(dict.fromkeys(getattr(one, field) for one in scores)) for field in ("task", "name"))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        own = [one for one in scores if one.name == name]
        places = [tasks.index(one.task) - 0.4 + width * (index + 0.5) for one in own]
        errors = [one.stderr or 0 for one in own]
        heights = [one.score for one in own]
        colour = RUNS[index % len(RUNS)]
        axes.bar(places, heights, 0.92 * width, yerr=errors, color=colour, label=plain(name), error_kw={"lw": 0.8})
    for place, task in enumerate(tasks):
        if task in CHANCE:
            axes.hlines(CHANCE[task], place - 0.45, place + 0.45, color=FAINT, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(tasks)), [plain(task) for task in tasks])
    axes.grid(axis="x", visible=False)


def rows_of(scores: Sequence[Score]) -> list[list[str]]:
    """Cells of a table: checkpoint, task, score with its standard error, questions, shots."""
    return [
        [
            one.name,
            one.task,
            f"{one.score:.4f}" + (f" ± {one.stderr:.4f}" if one.stderr is not None else ""),
            f"{one.n:,}",
            "–" if one.shots is None else str(one.shots),
        ]
        for one in scores
    ]
