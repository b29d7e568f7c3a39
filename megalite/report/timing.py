"""Pictures of time: the parts of a step on every rank, the pipeline measured and simulated, the whole run's hours."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from megalite.observe.goodput import Goodput
from megalite.report.remarks import slow_ranks
from megalite.report.run_directory import RankTimes, Run
from megalite.report.style import ALARM, FAINT, INK, PARTS, PHASES, WIDE, legend_below, new_figure, plain
from megalite.schedule.draw import COLOURS, IDLE, NAMES, shade
from megalite.schedule.ops import COMPUTE, Op, ScheduleError, parse_op
from megalite.schedule.simulate import simulate

_MOST_BARS = 32
_WAIT = "#f6e3c3"


def _chosen(ranks: Sequence[RankTimes], slow: Iterable[int]) -> list[RankTimes]:
    """As many ranks as a picture holds: the slow ones, those with the most work, and an even choice of the others."""
    if len(ranks) <= _MOST_BARS:
        return list(ranks)
    slow = set(slow)
    first = sorted(ranks, key=lambda rank: (rank.rank not in slow, -rank.work))[: _MOST_BARS // 2]
    rest = [rank for rank in ranks if rank not in first]
    even = rest[:: -(-len(rest) // (_MOST_BARS - len(first)))]
    return sorted([*first, *even], key=lambda rank: rank.rank)


def draw_breakdown(run: Run) -> Figure | None:
    """The parts of a mean step, one bar a rank; slow ranks are named in red."""
    ranks = [rank for rank in run.ranks if rank.mean is not None]
    if not ranks:
        return None
    slow = slow_ranks(ranks)
    shown = _chosen(ranks, slow)
    figure, axes = new_figure((WIDE[0], 1.5 + 0.3 * len(shown)))
    left = np.zeros(len(shown))
    for name, (label, colour) in PHASES.items():
        values = np.array([1e3 * rank.mean["seconds"].get(name, 0.0) for rank in shown if rank.mean is not None])
        if values.max() > 0.002 * max(left.max(), values.max()):
            axes.barh(range(len(shown)), values, left=left, color=colour, height=0.72, label=label)
        left += values
    names = [_label(rank) for rank in shown]
    axes.set_yticks(range(len(shown)), names)
    for tick, rank in zip(axes.get_yticklabels(), shown):
        if rank.rank in slow:
            tick.set(color=ALARM, fontweight="bold")
    for place, rank in enumerate(shown):
        if rank.rank in slow:
            axes.text(left[place], place, "  slow", va="center", color=ALARM, fontsize=8, fontweight="bold")
    axes.set(
        ylim=(len(shown) - 0.4, -0.6),
        xlim=(0, (1.08 if slow else 1.01) * left.max()),
        xlabel="milliseconds of a mean step",
    )
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    more = f" ({len(shown)} of {len(ranks)} ranks)" if len(shown) < len(ranks) else ""
    axes.set_title(f"Where the time of a step goes{more}")
    legend_below(figure, len(axes.get_legend_handles_labels()[1]))
    return figure


def _label(rank: RankTimes) -> str:
    place = " ".join(f"{axis}{rank.coordinate[axis]}" for axis, size in rank.shape.items() if size > 1)
    return f"rank {rank.rank}" + (f"  ({place})" if place else "")


def draw_breakdown_over_steps(run: Run) -> Figure | None:
    """The mean over the ranks, step by step."""
    ranks = [rank for rank in run.ranks if rank.rows]
    last = max((rank.rows[-1]["last"] for rank in ranks), default=0)
    first = min((rank.rows[0]["first"] for rank in ranks), default=0)
    if last <= first:
        return None
    edges = np.unique(np.linspace(first, last + 1, min(last + 1 - first, 160) + 1).round().astype(int))
    middle = (edges[:-1] + edges[1:] - 1) / 2
    layers = {name: np.zeros(len(middle)) for name in PHASES}
    for rank in ranks:
        starts = np.array([row["first"] for row in rank.rows])
        at = np.clip(np.searchsorted(starts, middle, side="right") - 1, 0, len(starts) - 1)
        for name, layer in layers.items():
            layer += np.array([row["seconds"].get(name, 0.0) for row in rank.rows])[at]
    figure, axes = new_figure((WIDE[0], 3.2))
    kept = {name: 1e3 * layer / len(ranks) for name, layer in layers.items()}
    total = np.sum(list(kept.values()), axis=0)
    kept = {name: layer for name, layer in kept.items() if layer.sum() > 0.002 * total.sum()}
    labels, colours = [PHASES[name][0] for name in kept], [PHASES[name][1] for name in kept]
    axes.stackplot(middle, list(kept.values()), labels=labels, colors=colours, linewidth=0)
    limit = min(1.5 * float(np.quantile(total, 0.9)), 1.05 * float(total.max()))  # the first steps may leave the frame
    axes.set(xlim=(first, last), ylim=(0, limit), xlabel="step", ylabel="milliseconds, mean of the ranks")
    axes.set_title("Step time over the run")
    legend_below(figure, len(axes.get_legend_handles_labels()[1]))
    return figure


@dataclass(frozen=True)
class PipelineSample:
    """One measured step of one column of pipeline ranks: [(operation, start, end)] in seconds, and waits."""

    step: int
    ranks: list[int]
    operations: list[list[tuple[Op, float, float]]]
    waits: list[list[tuple[float, float]]]


def find_sample(run: Run) -> PipelineSample | None:
    """The newest step that every pipeline rank of some column (the first that has one) has recorded."""
    columns: dict[tuple[int, ...], list[RankTimes]] = defaultdict(list)
    for rank in run.ranks:
        columns[tuple(rank.coordinate.get(axis, 0) for axis in ("dp", "cp", "tp"))].append(rank)
    for column in (columns[key] for key in sorted(columns)):
        column.sort(key=lambda rank: rank.coordinate.get("pp", 0))
        if len(column) != column[0].shape.get("pp", 1):
            continue
        common = set.intersection(*(set(rank.samples) for rank in column))
        if common:
            return _read_sample(max(common), column)
    return None


def _read_sample(step: int, column: list[RankTimes]) -> PipelineSample:
    rows: list[dict[str, Any]] = [rank.samples[step] for rank in column]
    operations = [[(parse_op(text), start, end) for text, start, end in row["operations"]] for row in rows]
    zero = min(start for each in operations for _, start, _ in each)
    moved = [[(op, start - zero, end - zero) for op, start, end in each if op.kind in COMPUTE] for each in operations]
    waits = [[(start - zero, end - zero) for _, start, end in row.get("waits", [])] for row in rows]
    return PipelineSample(step, [rank.rank for rank in column], moved, waits)


def _own(op: tuple[Op, float, float], waits: Sequence[tuple[float, float]]) -> float:
    """Seconds of an operation without the waits inside it."""
    _, start, end = op
    return end - start - sum(stop - begin for begin, stop in waits if begin >= start - 1e-6 and stop <= end + 1e-6)


def draw_pipeline(sample: PipelineSample) -> Figure | None:
    """The measured timeline above the simulated one of the same operations, each at its stage's median duration."""
    kinds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for operations, waits in zip(sample.operations, sample.waits):
        for each in operations:
            kinds[each[0].kind, each[0].stage].append(max(_own(each, waits), 1e-9))
    stages = 1 + max(stage for _, stage in kinds)
    costs = {
        kind: [statistics.median(kinds.get((kind, stage), [1e-9])) for stage in range(stages)]
        for kind in {kind for kind, _ in kinds}
    }
    try:
        simulation = simulate(tuple(tuple(op for op, _, _ in each) for each in sample.operations), costs)
    except ScheduleError:
        return None
    made = max(end for each in sample.operations for _, _, end in each)
    if min(made, simulation.makespan) <= 0:
        return None
    ranks = len(sample.ranks)
    figure = new_figure((WIDE[0], 1.9 + 0.62 * ranks))[0]
    figure.clear()
    above, below = figure.subplots(2, 1, sharex=True)
    scale = 1e3
    _rows(above, sample.ranks, sample.operations, sample.waits, scale, made)
    ideal = [[(event.op, event.start, event.end) for event in events] for events in simulation.timeline]
    _rows(below, sample.ranks, ideal, [[] for _ in ideal], scale, simulation.makespan)
    busy = sum(_own(op, waits) for each, waits in zip(sample.operations, sample.waits) for op in each)
    idle = 1.0 - busy / (made * ranks)
    above.set_title(f"Pipeline, step {sample.step}, measured: {scale * made:,.1f} ms, idle or waiting {idle:.0%}")
    ideal_time = f"{scale * simulation.makespan:,.1f} ms, bubble {simulation.bubble:.0%}"
    below.set_title(f"Simulated, with each stage's median times: {ideal_time}")
    below.set_xlabel("milliseconds from the first operation")
    used = [kind for kind in "FBIW" if kind in costs]
    patches = [Patch(facecolor=COLOURS[kind], label=NAMES[kind]) for kind in used]
    patches += [Patch(facecolor=_WAIT, label="waiting for a neighbour"), Patch(facecolor=IDLE, label="idle")]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure


def _rows(
    axes: Axes,
    ranks: Sequence[int],
    operations: Sequence[Sequence[tuple[Op, float, float]]],
    waits: Sequence[Sequence[tuple[float, float]]],
    scale: float,
    makespan: float,
) -> None:
    width = 0.85 * WIDE[0] / (scale * makespan)
    for row, (each, waiting) in enumerate(zip(operations, waits)):
        axes.add_patch(Rectangle((0, row - 0.42), scale * makespan, 0.84, facecolor=IDLE))
        own = {stage: place for place, stage in enumerate(sorted({op.stage for op, _, _ in each}))}
        for op, start, end in each:
            face = shade(COLOURS[op.kind], own[op.stage], len(own))
            box = Rectangle((scale * start, row - 0.42), scale * (end - start), 0.84, facecolor=face, edgecolor="white")
            box.set_linewidth(0.6)
            axes.add_patch(box)
            text = str(op.micro)
            begin = max([stop for _, stop in waiting if start <= stop <= end], default=start)
            if scale * (end - begin) * width > 0.075 * len(text) + 0.03:
                middle = scale * (begin + end) / 2
                axes.text(middle, row, text, ha="center", va="center", fontsize=7, color=INK)
        for start, end in waiting:
            axes.add_patch(Rectangle((scale * start, row - 0.42), scale * (end - start), 0.84, facecolor=_WAIT))
    axes.set(ylim=(len(ranks) - 0.5, -0.5))
    axes.set_xlim(0, max(axes.get_xlim()[1] if axes.get_xlim()[1] > 1 else 0, scale * makespan))
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def draw_goodput(runs: Sequence[tuple[str, Goodput]]) -> Figure | None:
    """How the time since the first start divides, one bar a run."""
    if not runs:
        return None
    figure, axes = new_figure((WIDE[0], 1.3 + 0.42 * len(runs)))
    left = np.zeros(len(runs))
    for part, colour in PARTS.items():
        shares = np.array([each.seconds[part] / each.wall if each.wall else 0.0 for _, each in runs]) * 100
        if not shares.any():
            continue
        axes.barh(range(len(runs)), shares, left=left, color=colour, height=0.62, label=part)
        for place, share in enumerate(shares):
            middle = left[place] + share / 2
            if share > 5 and middle < 100:  # parts of a damaged file may add up to far more
                axes.text(middle, place, f"{share:.0f} %", ha="center", va="center", fontsize=8, color=INK)
        left += shares
    names = [f"{plain(name)}\n{timedelta(seconds=round(each.wall))}" for name, each in runs]
    axes.set_yticks(range(len(runs)), names)
    axes.set(xlim=(0, 100), ylim=(len(runs) - 0.5, -0.5), xlabel="per cent of the time since the first start")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=FAINT)
    axes.set_title("Effective training time")
    figure.legend(loc="outside lower center", ncols=7)
    return figure
