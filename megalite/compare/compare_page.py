"""One page about a comparison: what differs first, the difference against the noise along the execution, a table."""

from __future__ import annotations

import base64
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megalite.compare.sides import Side
from megalite.compare.verdict import FACTOR, Measured, Verdict
from megalite.errors import UserError
from megalite.observe.formatting import counted
from megalite.report.style import (
    ALARM,
    FAINT,
    RUNS,
    WIDE,
    legend_below,
    new_figure,
    page_template,
    plain,
    styled,
    to_png,
    write_file,
)

_ROWS = 60
"""The table begins with the first difference, or where the ratio is largest."""
_PARTS = {
    "input": "data", "weight": "weights", "activation": "forward", "loss": "loss",
    "activation_gradient": "backward", "gradient": "backward", "grad_norm": "norm", "lr": "",
    "optimizer_state": "state",
}  # fmt: skip


def write_page(verdict: Verdict, a: Side, b: Side, output: Path) -> Path:
    """Write compare.html and compare.png to the directory `output`; the page's path. Raises `UserError`."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made ({error.strerror}); name a directory") from error
    with styled():
        picture = to_png(draw(verdict))
    write_file(output / "compare.png", picture)
    content = _content(verdict, a, b) | {"picture": base64.b64encode(picture).decode()}
    page = output / "compare.html"
    write_file(
        page, page_template("megalite.compare/compare_page.html").render(**content).encode("utf-8", "backslashreplace")
    )
    return page


def draw(verdict: Verdict) -> Figure:
    """Relative difference and allowed noise of every tensor, in the order of execution; steps side by side."""
    figure, axes = new_figure((WIDE[0], 4.4))
    measured, first = verdict.measured, verdict.first
    places = range(len(measured))
    finite = [each.difference for each in measured if 0 < each.difference < float("inf")]
    least = min([*finite, *(each.noise for each in measured if each.noise > 0)], default=1e-9) / 3
    axes.plot(places, [max(each.noise * FACTOR, least) for each in measured], color=RUNS[1], label="allowed")
    axes.plot(places, [max(each.noise, least) for each in measured], color=RUNS[4], linewidth=0.8, label="noise")
    for wrong, colour, label in ((False, RUNS[0], "difference"), (True, ALARM, "beyond the noise")):
        some = [place for place in places if measured[place].differs == wrong and not measured[place].same_bits]
        shown = [min(max(measured[place].difference, least), 1e3) for place in some]
        axes.plot(some, shown, linestyle="", marker=".", markersize=4, color=colour, label=label)
    if first is not None:
        place = measured.index(first)
        axes.axvline(place, color=ALARM, linewidth=0.8)
        axes.annotate(
            plain(first.port.name), (place, 1.0), xycoords=("data", "axes fraction"), color=ALARM, fontsize=8, va="top"
        )
    _name_parts(axes, measured)
    axes.set(yscale="log", ylabel="relative to the tensor", title="Difference and noise in the order of execution")
    legend_below(figure, 4)
    return figure


def _name_parts(axes: Any, measured: list[Measured]) -> None:
    """The parts of each step, below the axis."""
    begin, ticks, names = 0, [], []
    for (step, part), group in groupby(measured, key=lambda each: (each.port.step, _PARTS[each.port.kind])):
        length = len(list(group))
        if length > len(measured) / 40:
            ticks.append(begin + length / 2)
            names.append(f"{part}\nstep {step}" if step else f"{part}\nat the start")
        axes.axvline(begin - 0.5, color=FAINT, linewidth=0.4, alpha=0.5)
        begin += length
    axes.set_xticks(ticks, names)
    axes.set_xlim(-1, begin)


def _content(verdict: Verdict, a: Side, b: Side) -> dict[str, Any]:
    first = verdict.first
    if first is None:
        headline = "No tensor differs beyond the noise"
        begin = 0
    else:
        headline = f"{first.port.name} differs first"
        begin = max(0, verdict.measured.index(first) - 5)
    same = sum(each.same_bits for each in verdict.measured)
    return {
        "headline": headline,
        "serious": first is not None,
        "sentence": "" if first is None else sentence(first),
        "counts": f"{counted(len(verdict.measured), 'tensor')} compared, {same} with the same bits, "
        f"{verdict.alone} on one side alone",
        "sides": [(side.letter, describe(side)) for side in (a, b)],
        "factor": f"{FACTOR:g}",
        "rows": [_row(each) for each in verdict.measured[begin : begin + _ROWS]],
        "begins": "" if begin == 0 else "from shortly before the first difference",
    }


def sentence(first: Measured) -> str:
    """What is known of the first difference, in one line."""
    where = f"step {first.port.step}, {first.port.operation}" if first.port.step else first.port.operation
    box = " x ".join(f"{start}:{start + length}" for start, length in zip(first.offset, first.size))
    size = f"{first.difference:.3g} of its size, where noise is {first.noise:.3g}"
    remark = f"; {first.remark}" if first.remark else ""
    kind = first.port.kind.replace("_", " ")
    return f"{kind} in {where}: rank {first.rank} of side {first.side}, [{box}], {size}{remark}"


def describe(side: Side) -> str:
    """Overrides, processes, and where the code or the model is from."""
    source = f" from {side.tree}" if side.tree else f" of {side.model}" if side.model else ""
    return f"{' '.join(side.overrides) or 'the recipe as it is'}, {counted(side.processes, 'process')}{source}"


def _row(each: Measured) -> dict[str, Any]:
    return {
        "name": each.port.name,
        "kind": each.port.kind.replace("_", " "),
        "step": each.port.step,
        "operation": each.port.operation,
        "difference": "same bits" if each.same_bits else f"{each.difference:.2e}",
        "noise": f"{each.noise:.2e}",
        "rank": each.rank,
        "serious": each.differs,
    }
