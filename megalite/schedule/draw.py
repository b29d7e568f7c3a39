"""Drawings of a simulated plan, as an image or text: one row per rank, one box per operation, time to the right."""

import math
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from megalite.errors import UserError
from megalite.schedule.simulate import Event, Simulation

COLOURS = {"F": "#8ab6e8", "B": "#8fce9b", "I": "#8fd6cf", "W": "#e3b983"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
IDLE = "#f1f1f1"
_INCHES_A_DIGIT = 0.085


def headline(name: str, simulation: Simulation, micro_batches: int) -> str:
    """One line for titles: the schedule, its size, and its bubble."""
    ranks = len(simulation.timeline)
    stages = 1 + max(event.op.stage for events in simulation.timeline for event in events)
    chunks = f" × {stages // ranks} stages" if stages > ranks else ""
    return f"{name}: {ranks} ranks{chunks}, {micro_batches} micro-batches, bubble {simulation.bubble:.1%}"


def draw(simulation: Simulation, path: Path, title: str) -> None:
    """Write the timeline as an image; the format is the path's suffix (png, svg, pdf).

    Boxes are labelled with the micro-batch if it fits; a rank's later (virtual) stages have darker colours. To the
    right of each row is the peak number of micro-batches whose activations the rank holds.
    """
    ranks = len(simulation.timeline)
    width = min(max(0.3 * simulation.makespan / _shortest(simulation), 9.0), 48.0)
    figure = Figure(figsize=(width, 0.5 * ranks + 1.7), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix[1:] not in canvas.get_supported_filetypes():
        raise UserError(f"--output {path}: images can be .png, .svg or .pdf, not {path.suffix or 'without a suffix'}")
    axes = figure.add_subplot()
    inches_a_unit = 0.8 * width / simulation.makespan
    legend: dict[tuple[str, int], Patch] = {}
    for rank, events in enumerate(simulation.timeline):
        axes.add_patch(Rectangle((0, rank - 0.45), simulation.makespan, 0.9, facecolor=IDLE, edgecolor="none"))
        chunk_of = {stage: chunk for chunk, stage in enumerate(sorted({event.op.stage for event in events}))}
        for event in events:
            chunk = chunk_of[event.op.stage]
            colour = shade(COLOURS[event.op.kind], chunk, len(chunk_of))
            name = NAMES[event.op.kind] + (f", stage {chunk + 1} of the rank" if len(chunk_of) > 1 else "")
            legend.setdefault((event.op.kind, chunk), Patch(facecolor=colour, edgecolor="white", label=name))
            duration = event.end - event.start
            axes.add_patch(
                Rectangle((event.start, rank - 0.45), duration, 0.9, facecolor=colour, edgecolor="white", linewidth=0.8)
            )
            label = str(event.op.micro)
            if duration * inches_a_unit > _INCHES_A_DIGIT * len(label):
                axes.text(event.start + duration / 2, rank, label, ha="center", va="center", fontsize=8)
        held = f" holds {simulation.peak_live[rank]}"
        axes.text(simulation.makespan, rank, held, ha="left", va="center", fontsize=9, color="#555555")
    legend[("", 0)] = Patch(facecolor=IDLE, edgecolor="#cccccc", label="idle")
    axes.set(xlim=(0, simulation.makespan), ylim=(ranks - 0.5, -0.5), title=title)
    axes.set_xlabel("time, in units of one stage's forward; right: activations that the rank holds at most")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    patches = [legend[key] for key in sorted(legend, key=lambda key: ("FBIW".find(key[0]) if key[0] else 9, key[1]))]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 5), frameon=False, fontsize=9)
    _save(figure, path)


def as_text(simulation: Simulation) -> str:
    """The timeline in characters: a column is the shortest operation, `-` continues an operation, `.` is idle."""
    unit = _shortest(simulation)
    column = 1 + max(len(str(event.op)) for events in simulation.timeline for event in events)

    def at(time: float) -> int:
        return math.floor(time / unit + 0.5 + 1e-9)

    def row(events: tuple[Event, ...]) -> str:
        cells = ["."] * at(simulation.makespan)
        for event in events:
            begin, end = at(event.start), at(event.end)
            cells[begin:end] = [str(event.op)] + ["-" * (column - 1)] * (end - begin - 1)
        return "".join(cell.ljust(column) for cell in cells).rstrip()

    return "".join(f"rank {rank:>2}  {row(events)}\n" for rank, events in enumerate(simulation.timeline))


def _shortest(simulation: Simulation) -> float:
    return min(event.end - event.start for events in simulation.timeline for event in events)


def shade(colour: str, chunk: int, chunks: int) -> str:
    """Darker for later chunks, but light enough for black digits."""
    light = 1.0 - 0.28 * chunk / max(chunks - 1, 1)
    red, green, blue = to_rgb(colour)
    return to_hex((red * light, green * light, blue * light))


def _save(figure: Figure, path: Path) -> None:
    """Write the file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=110)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"--output {path}: cannot be written ({error.strerror}); give a file in a writable folder"
        ) from error
