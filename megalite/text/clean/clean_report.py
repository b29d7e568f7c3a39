"""The report of a cleaning run: `report.json`, a table for the terminal, and histograms in `report.png`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from megalite.files import atomic_file, write_atomically, write_errors_named
from megalite.text.clean.cleaner import BINS_PER_CHARACTER, BINS_PER_OCTAVE, Counts
from megalite.text.shards import Unusable

_KEPT, _REJECTED = "#2a6f97", "#d1495b"


def write_report(output: Path, counts: Counts, unusable: Unusable, seconds: float) -> None:
    """Write `report.json` and `report.png` into the output directory and print the table."""
    report = {**asdict(counts), "unusable": asdict(unusable), "seconds": round(seconds, 3)}
    with write_errors_named(output / "report.json"):
        write_atomically(output / "report.json", orjson.dumps(report, option=orjson.OPT_INDENT_2))
    with write_errors_named(output / "report.png"), atomic_file(output / "report.png") as file:
        draw(file, counts)
    _print_table(counts, unusable, seconds)
    print(f"shards and report: {output}")


def _print_table(counts: Counts, unusable: Unusable, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Cleaning")
    for name, side in (("", "left"), ("documents", "right"), ("share", "right"), ("characters", "right")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]

    def row(name: str, documents: int, characters: int | None) -> None:
        share = f"{documents / max(1, counts.documents):.1%}"
        table.add_row(name, f"{documents:,}", share, f"{characters:,}" if characters is not None else "")

    row("read", counts.documents, counts.characters)
    row("kept", counts.kept, counts.kept_characters)
    table.add_section()
    for rule, number in sorted(counts.rejected.items(), key=lambda item: (-item[1], item[0])):
        row(rule.replace("[", r"\["), number, counts.rejected_characters[rule])
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    for title, numbers in (
        ("lines removed", counts.removed_lines),
        ("addresses masked", counts.masked),
        ("records that cannot be used", unusable.counts),
    ):
        if numbers:
            listed = ", ".join(f"{name} {number:,}" for name, number in sorted(numbers.items()))
            console.print(f"{title}: {listed}", markup=False, highlight=False, soft_wrap=True)
    for example in unusable.examples:
        console.print(f"  {example}", markup=False, highlight=False, soft_wrap=True)
    speed = counts.characters / 1e6 / max(seconds, 1e-9)
    console.print(f"{seconds:.1f} s, {speed:.1f} million characters a second", highlight=False)


def draw(file: BinaryIO, counts: Counts) -> None:
    """Histograms of size and word length, kept against rejected, and documents rejected by rule, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplot_mosaic([["size", "words", "length"], ["rejections"] * 3])
    size, words, length = panels["size"], panels["words"], panels["length"]
    _draw_sizes(size, counts, "characters")
    _draw_sizes(words, counts, "words")
    _draw_bins(length, counts, "mean_word_length", lambda bins: bins / BINS_PER_CHARACTER)
    length.set_xlabel("mean word length (characters)")
    for axes in (size, words, length):
        axes.set_ylabel("documents")
        axes.legend()
    _draw_rejections(panels["rejections"], counts.rejected)
    share = counts.kept / max(1, counts.documents)
    figure.suptitle(f"kept {counts.kept:,} of {counts.documents:,} documents ({share:.1%})")
    figure.savefig(file, dpi=110, format="png")


def _draw_sizes(axes: Any, counts: Counts, name: str) -> None:
    _draw_bins(axes, counts, name, lambda bins: np.exp2(bins / BINS_PER_OCTAVE))
    axes.set_xscale("log")
    axes.set_xlabel(f"{name} in a document")


def _draw_bins(axes: Any, counts: Counts, name: str, edge: Any) -> None:
    """Stacked bars, kept below rejected; `edge` gives a bin's lower edge."""
    kept, rejected = (
        {int(bin_): n for bin_, n in counts.histograms.get(f"{name}/{verdict}", {}).items()}
        for verdict in ("kept", "rejected")
    )
    present = [*kept, *rejected] or [0]
    bins = np.arange(min(present), max(present) + 1)
    left, width = edge(bins), edge(bins + 1) - edge(bins)
    kept_heights = np.array([kept.get(bin_, 0) for bin_ in bins.tolist()])
    rejected_heights = np.array([rejected.get(bin_, 0) for bin_ in bins.tolist()])
    axes.bar(left, kept_heights, width, align="edge", color=_KEPT, label="kept")
    axes.bar(left, rejected_heights, width, bottom=kept_heights, align="edge", color=_REJECTED, label="rejected")


def _draw_rejections(axes: Any, rejected: dict[str, int]) -> None:
    most = sorted(rejected.items(), key=lambda item: (item[1], item[0]))[-15:]
    axes.barh([rule for rule, _ in most], [number for _, number in most], color=_REJECTED)
    axes.set_xlabel("documents rejected, by first broken rule")
    axes.tick_params(axis="y", labelsize=8)
    if not most:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
