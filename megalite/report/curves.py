"""Pictures over the tokens of one run or several: loss, gradient norm, learning rate, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from megalite.observe.picture import SMOOTH_FROM, smooth
from megalite.report.run_directory import Run
from megalite.report.style import FAINT, HALF, RUNS, WIDE, new_figure, plain, token_axis

_WIDE_SPREAD = 30.0

_TOKEN_LOSSES = {"next_token", "sft"}

OBJECTIVES = {
    "reward_mean": ("Reward", "mean score of an answer"),
    "validation_reward": ("Reward, validation prompts", "mean score of an answer"),
    "kl": ("Divergence from the reference", "nats per answer"),
    "entropy": ("Entropy of the policy", "nats per token"),
    "response_tokens": ("Length of answers", "tokens"),
    "accuracy": ("Pairs in the right order", "share of pairs"),
    "margin": ("Chosen above rejected", "difference of scores"),
    "aux_loss": ("Losses of the routers", "added to the loss"),
    "expert_load_max": ("Busiest expert of any layer", "load over the mean"),
    "sampler_difference": ("Sampler against trainer", "nats per token"),
}
"""Numbers of some objectives: column of metrics.jsonl -> (title, unit)."""


def colour(index: int) -> str:
    return RUNS[index % len(RUNS)]


def _plot(axes: Axes, run: Run, values: Sequence[float], number: int, label: str) -> None:
    tokens, line = run.tokens, colour(number)
    finite = sum(map(math.isfinite, values))
    if len(values) > SMOOTH_FROM:
        axes.plot(tokens, values, color=line, alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smooth(values), color=line, label=label)
    else:
        axes.plot(tokens, values, color=line, label=label, marker="o" if finite < 3 else None, markersize=4)


def _legend(axes: Axes, runs: Sequence[Run], force: bool = False) -> None:
    if len(runs) > 1 or force:
        axes.legend(loc="best")


def _empty(axes: Axes, what: str) -> None:
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=FAINT)
    axes.set(xticks=[], yticks=[])


def _restarts(axes: Axes, run: Run) -> None:
    """A thin line at each restart or rollback."""
    at = {row["step"]: row["tokens"] for row in run.rows if isinstance(row.get("tokens"), int | float)}
    marks = {event.get("step") for event in run.happened("ready")} | {
        e.get("to_step") for e in run.happened("rollback")
    }
    places = sorted(at[step] for step in marks if step in at)
    for index, place in enumerate(places):
        label = "restart or rollback" if index == 0 else None
        axes.axvline(place, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), label=label)


def draw_loss(runs: Sequence[Run]) -> Figure:
    """Training and validation loss against tokens."""
    figure, axes = new_figure(WIDE)
    seen = False
    for number, run in enumerate(runs):
        losses, checked = run.column("loss"), run.column("validation_loss")
        if not any(map(math.isfinite, losses)):
            continue
        seen = True
        _plot(axes, run, losses, number, plain(run.name) if len(runs) > 1 else "training")
        points = [(t, v) for t, v in zip(run.tokens, checked) if math.isfinite(v)]
        if points:
            label = "validation" if len(runs) == 1 else f"{plain(run.name)}, validation"
            axes.plot(*zip(*points), "o", color=colour(number), markerfacecolor="white", markersize=5, label=label)
        if len(runs) == 1:
            _restarts(axes, run)
            refused = [t for t, v in zip(run.tokens, losses) if not math.isfinite(v)]
            if refused:
                axes.plot(refused, [axes.get_ylim()[1]] * len(refused), "x", color="#b3261e", label="step refused")
    axes.set_title("Loss")
    if not seen:
        _empty(axes, "no step with a finite loss")
        return figure
    kinds = {str(run.setting("objective", "kind", "next_token")) for run in runs}
    axes.set_ylabel("nats per token" if kinds <= _TOKEN_LOSSES else "mean of the objective")
    token_axis(axes)
    axes.legend(loc="upper right")
    return figure


def draw_evaluations(runs: Sequence[Run]) -> Figure | None:
    """Bits per byte of the tasks' answers during training (`eval.tasks`); None where no run measured any."""
    ending = "_bits_per_byte"
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row if name.endswith(ending))
    found = [(run, name, run.column(name)) for run in runs for name in names]
    found = [(run, name, values) for run, name, values in found if any(map(math.isfinite, values))]
    if not found:
        return None
    figure, axes = new_figure(WIDE)
    for number, (run, name, values) in enumerate(found):
        points = [(tokens, value) for tokens, value in zip(run.tokens, values) if math.isfinite(value)]
        task = name.removesuffix(ending)
        label = f"{task}, {run.name}" if len(runs) > 1 else task
        axes.plot(*zip(*points), color=colour(number), marker="o", markersize=4, label=plain(label))
    axes.set_title("Answers of evaluations")
    axes.set_ylabel("bits per byte")
    token_axis(axes)
    axes.legend(loc="upper right")
    return figure


def _draw(runs: Sequence[Run], column: str, title: str, unit: str, shape: Callable[[Axes], None]) -> Figure:
    """One column of metrics.jsonl against tokens."""
    figure, axes = new_figure(HALF)
    axes.set_title(title)
    values = [run.column(column) for run in runs]
    finite = [value for each in values for value in each if math.isfinite(value)]
    if not finite:
        _empty(axes, "nothing recorded")
        return figure
    for number, (run, each) in enumerate(zip(runs, values)):
        if any(map(math.isfinite, each)):
            _plot(axes, run, each, number, plain(run.name))
    axes.set_ylabel(unit)
    token_axis(axes)
    shape(axes)
    _legend(axes, runs)
    return figure


def _from_zero(axes: Axes) -> None:
    highest = max((float(np.nanmax(line.get_ydata())) for line in axes.get_lines()), default=1.0)
    axes.set_ylim(0, 1.08 * highest if highest > 0 else 1.0)


def draw_gradient_norm(runs: Sequence[Run]) -> Figure:
    values = [value for run in runs for value in run.column("grad_norm") if math.isfinite(value) and value > 0]
    wide = bool(values) and max(values) / min(values) > _WIDE_SPREAD
    shape = (lambda axes: axes.set_yscale("log")) if wide else _from_zero
    return _draw(runs, "grad_norm", "Gradient norm", "before clipping", shape)


def draw_learning_rate(runs: Sequence[Run]) -> Figure:
    def shape(axes: Axes) -> None:
        _from_zero(axes)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)

    return _draw(runs, "lr", "Learning rate", "step size", shape)


def draw_throughput(runs: Sequence[Run]) -> Figure:
    def shape(axes: Axes) -> None:
        _from_zero(axes)
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))

    return _draw(runs, "tokens_per_second", "Throughput, all devices", "tokens per second", shape)


def draw_utilisation(runs: Sequence[Run]) -> Figure:
    """MFU; TFLOP/s per device if no run knows its device's peak."""
    if any(math.isfinite(value) for run in runs for value in run.column("mfu")):

        def shape(axes: Axes) -> None:
            _from_zero(axes)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

        return _draw(runs, "mfu", "Model FLOPs utilisation", "of the device's bf16 peak", shape)
    unknown = "Model FLOPs (MFU: the device's peak is unknown)"
    return _draw(runs, "tflops_per_device", unknown, "TFLOP/s a device", _from_zero)


def draw_memory(runs: Sequence[Run]) -> Figure:
    return _draw(runs, "memory_gib", "Peak memory, rank 0", "GiB", _from_zero)


def draw_step_time(runs: Sequence[Run]) -> Figure:
    return _draw(runs, "step_seconds", "Step time", "seconds", _from_zero)


def draw_objective(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of every number of an objective that any run has recorded."""
    for column, (title, unit) in OBJECTIVES.items():
        if any(math.isfinite(value) for run in runs for value in run.column(column)):
            yield column, _draw(runs, column, title, unit, lambda axes: None)
