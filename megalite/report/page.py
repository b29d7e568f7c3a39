"""One HTML page with pictures, remarks and tables that needs no other file; each picture is also written as a PNG."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import tomli_w
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megalite.errors import ENDINGS, UserError
from megalite.observe.formatting import counted
from megalite.observe.metrics import whole
from megalite.report import curves, timing
from megalite.report.remarks import history, remarks
from megalite.report.run_directory import Run
from megalite.report.scores import Score, draw_scores, rows_of
from megalite.report.style import page_template, styled, to_png, write_file

_SUMMARY = (
    "state", "steps", "tokens", "validation loss", "training loss", "tokens/s", "MFU", "memory",
    "effective training time", "rollbacks", "samples skipped",
)  # fmt: skip
_MOST_EVENTS = 200
_MOST_COMPLAINTS = 200
_ABSENT = "–"


def write_report(runs: Sequence[Run], output: Path, scores: Sequence[Score] = ()) -> Path:
    """Write report.html and its pictures to the directory `output`; the page's path. Runs or scores may be missing."""
    template = page_template("megalite.report/page.html")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made ({error.strerror}); name a directory") from error
    pictures: dict[str, str] = {}
    with styled():
        for name, figure in _pictures(runs, scores):
            if figure is None:
                continue
            content = to_png(figure)
            write_file(output / f"{name}.png", content)
            pictures[name] = base64.b64encode(content).decode()
    text = template.render(**_content(runs, pictures, scores))
    page = output / "report.html"
    write_file(page, text.encode("utf-8", "backslashreplace"))
    return page


def _pictures(runs: Sequence[Run], scores: Sequence[Score]) -> Iterator[tuple[str, Figure | None]]:
    yield "scores", draw_scores(scores)
    if not runs:
        return
    yield "evaluations", curves.draw_evaluations(runs)
    yield "loss", curves.draw_loss(runs)
    yield from curves.draw_objective(runs)
    yield "gradient_norm", curves.draw_gradient_norm(runs)
    yield "learning_rate", curves.draw_learning_rate(runs)
    yield "throughput", curves.draw_throughput(runs)
    yield "utilisation", curves.draw_utilisation(runs)
    yield "step_time", curves.draw_step_time(runs)
    yield "memory", curves.draw_memory(runs)
    yield "goodput", timing.draw_goodput([(run.name, run.goodput) for run in runs if run.goodput is not None])
    for number, run in enumerate(runs):
        names = _timing_names(runs, number)
        yield names[0], timing.draw_breakdown(run)
        yield names[1], timing.draw_breakdown_over_steps(run)
        sample = timing.find_sample(run)
        yield names[2], timing.draw_pipeline(sample) if sample is not None else None


def _timing_names(runs: Sequence[Run], number: int) -> list[str]:
    """Names of the pictures that each run has for itself."""
    end = f"_{number + 1}" if len(runs) > 1 else ""
    return [f"{name}{end}" for name in ("breakdown_ranks", "breakdown_steps", "pipeline")]


def _content(runs: Sequence[Run], pictures: dict[str, str], scores: Sequence[Score]) -> dict[str, Any]:
    several = len(runs) > 1
    timed = [
        (run, [name for name in _timing_names(runs, number) if name in pictures]) for number, run in enumerate(runs)
    ]
    return {
        "title": _title(runs),
        "subtitle": "compared with each other" if several else _describe(runs[0]) if runs else "",
        "scores": rows_of(scores),
        "several": several,
        "names": [run.name for run in runs],
        "pictures": dict.fromkeys(["loss"], "") | pictures,
        "objective": [name for name in curves.OBJECTIVES if name in pictures],
        "heads": [{"name": run.name, "colour": curves.colour(number)} for number, run in enumerate(runs)],
        "summary": list(zip(_SUMMARY, zip(*map(_summary, runs)))),
        "remarks": [
            {"run": run.name, "serious": remark.serious, "text": remark.text} for run in runs for remark in remarks(run)
        ],
        "timing": [{"name": run.name, "pictures": names} for run, names in timed if names],
        "any_timeline": any(names for _, names in timed),
        "differences": differences(runs),
        "histories": [
            {
                "name": run.name,
                "lines": history(run)[-_MOST_EVENTS:],
                "complaints": run.complaints[-_MOST_COMPLAINTS:],
                "config": tomli_w.dumps(run.config) if run.config else "",
            }
            for run in runs
        ],
    }


def _title(runs: Sequence[Run]) -> str:
    if not runs:
        return "Evaluations"
    return f"{len(runs)} runs" if len(runs) > 1 else runs[0].name


def _describe(run: Run) -> str:
    """One line: how the run was laid out."""
    if not run.config:
        return "no configuration was found"
    model = f"{run.setting('model', 'layers')} layers of width {run.setting('model', 'hidden_size')}"
    starts = run.happened("start")
    ranks = f", {counted(starts[-1]['ranks'], 'rank')}" if starts and "ranks" in starts[-1] else ""
    axes = [f"{name} {run.setting('parallel', name)}" for name in ("tensor", "pipeline", "context")]
    layout = ", ".join(axis for axis in axes if not axis.endswith((" 1", " None")))
    schedule = (
        f" ({run.setting('parallel', 'schedule')})" if (whole(run.setting("parallel", "pipeline")) or 1) > 1 else ""
    )
    parts = f": {layout}{schedule}" if layout else ""
    return f"{model}{ranks}{parts}, {run.setting('train', 'precision')}"


def state_of(run: Run) -> str:
    """Whether the run is finished, was stopped, or ended otherwise."""
    stops, starts = run.happened("stop"), run.happened("start")
    if not starts:
        return _ABSENT
    if not stops or stops[-1]["time"] < starts[-1]["time"]:
        return "running or killed"
    code = stops[-1].get("code", 1)
    if code == 0:
        steps, made = whole(run.setting("train", "steps")), run.last("step")
        return "finished" if not steps or not made or made >= steps else "stopped early"
    return ENDINGS.get(int(code), f"failed (exit code {code})")


def _summary(run: Run) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return _ABSENT if value is None or math.isnan(value) else form.format(value)

    goodput, plan, tokens = run.goodput, whole(run.setting("train", "steps")), run.last("tokens")
    trained, checked = run.final_losses
    starts = f", {counted(goodput.starts, 'start')}" if goodput and goodput.starts > 1 else ""
    training = f"{goodput.share:.1%} of {timedelta(seconds=round(goodput.wall))}{starts}" if goodput else _ABSENT
    return [
        state_of(run),
        text(run.last("step"), "{:,.0f}") + (f" of {plan:,}" if plan else ""),
        _ABSENT if tokens is None else EngFormatter(places=1, sep=" ")(tokens),
        text(checked, "{:.4f}"),
        text(trained, "{:.4f}"),
        text(run.median("tokens_per_second"), "{:,.0f}"),
        text(run.median("mfu"), "{:.1%}"),
        text(run.last("memory_gib"), "{:.2f} GiB"),
        training,
        text(run.last("rollbacks"), "{:.0f}"),
        text(run.last("skipped_samples"), "{:,.0f}"),
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(section.field, its value in each run) where the resolved configurations differ, but for run.dir."""
    if len(runs) < 2:
        return []
    flat = [_flat(run.config) for run in runs]
    found = []
    for field in dict.fromkeys(field for each in flat for field in each):
        values = [each.get(field, _ABSENT) for each in flat]
        if field != "run.dir" and any(value != values[0] for value in values):
            found.append((field, [str(value) for value in values]))
    return found


def _flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()}
