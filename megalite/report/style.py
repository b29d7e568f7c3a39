"""How pictures and pages look: one quiet style, the same colours for the same things everywhere."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megalite.errors import UserError
from megalite.files import write_atomically

RUNS = ("#3b6ea8", "#c8743c", "#4f9a6a", "#9a5ba0", "#b8a23a", "#5c6b73", "#c25b6a", "#4aa3a3")
"""Colours of the runs, in the order in which they are named; more runs take them again."""
PHASES = {
    "data": ("reading data", "#b9a3d0"),
    "forward": ("forward", "#8ab6e8"),
    "backward": ("backward", "#8fce9b"),
    "optimizer": ("optimizer", "#4f9a8a"),
    "wait_optimizer": ("optimizer's exchanges", "#a3cfc4"),
    "gather": ("parameter gather", "#7fb3b0"),
    "reduce": ("gradient reduction", "#e3b983"),
    "wait_tensor": ("tensor parallel", "#f0d28a"),
    "wait_context": ("context parallel", "#e6c0a0"),
    "wait_expert": ("expert parallel", "#d8b48c"),
    "wait_pipeline": ("pipeline", "#dba17f"),
    "rollout": ("writing answers", "#9fb8a0"),
    "reward": ("rewards", "#c9a0b4"),
    "score": ("scoring answers", "#a8a3c8"),
    "wait_others": ("waiting for all ranks", "#d9d9d9"),
    "other": ("other", "#a9a9a9"),
}
"""Label and colour of each part of a step; forward and backward as in the pictures of schedules."""
PARTS = {
    "training": "#4f9a6a",
    "start-up": "#8ab6e8",
    "checkpoints": "#b9a3d0",
    "validation": "#7fb3b0",
    "lost": "#c25b6a",
    "down": "#e3a483",
    "other": "#c4c4c4",
}
INK, FAINT, ALARM = "#333333", "#777777", "#b3261e"

_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "axes.edgecolor": "#999999", "axes.linewidth": 0.7, "axes.labelcolor": INK, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7,
}  # fmt: skip
WIDE, HALF = (9.6, 3.6), (4.7, 2.7)
_DPI = 140


def styled() -> AbstractContextManager[None]:
    """The style, for as long as a picture is made."""
    return rc_context(_STYLE)


def new_figure(size: tuple[float, float] = HALF) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def token_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def legend_below(figure: Figure, entries: int) -> None:
    """Under the axes, in one row or in two of about the same length."""
    figure.legend(loc="outside lower center", ncols=entries if entries <= 6 else -(-entries // 2))


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def plain(text: str) -> str:
    """Somebody's text as a label: no formula ($…$), and no name that matplotlib hides (_…)."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def write_file(path: Path, content: bytes) -> None:
    """Under its final name only when whole."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error.strerror}); name a writable directory") from error


def page_template(name: str) -> Any:
    """The Jinja template of a page, or of what pages include: `PACKAGE/FILE`."""
    import jinja2  # here, for machines that train without it

    def read(name: str) -> str:
        package, _, file = name.partition("/")
        return resources.files(package).joinpath(file).read_text(encoding="utf-8")

    loader = jinja2.FunctionLoader(read)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)
