"""The report of a deduplication: `report.json`, a table for the terminal, and histograms in `report.png`."""

from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from megalite.files import atomic_file, write_atomically, write_errors_named
from megalite.text.dedup.deduplication import DedupSummary
from megalite.text.dedup.near import SIMILARITY_BINS

_SIMILAR, _OTHER = "#d1495b", "#8d99ae"


def write_report(output: Path, summary: DedupSummary) -> None:
    """Write `report.png` and then `report.json`, whose presence marks a finished run, and print the table."""
    with write_errors_named(output / "report.png"), atomic_file(output / "report.png") as file:
        draw(file, summary)
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
    with write_errors_named(output / "report.json"):
        write_atomically(output / "report.json", orjson.dumps(asdict(summary), option=options))
    _print_table(summary)
    print(f"shards and report: {output}")


def _print_table(summary: DedupSummary) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Deduplication")
    table.add_column("")
    table.add_column("documents", justify="right")
    table.add_column("share", justify="right")
    rows = {"read": summary.documents, **summary.removed, "kept": summary.kept}
    for name, number in rows.items():
        table.add_row(name.replace("_", " "), f"{number:,}", f"{number / max(1, summary.documents):.1%}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    largest = max(summary.cluster_sizes, default=0)
    console.print(
        f"{summary.clusters:,} clusters of similar documents, the largest of {largest:,}; "
        f"{summary.compared_pairs:,} pairs compared; {summary.bands} bands x {summary.rows} rows find "
        f"{summary.expected_recall_at_threshold:.1%} of pairs at the threshold {summary.threshold}"
    )
    if summary.benchmark_items:
        console.print(
            f"searched for {summary.benchmark_items:,} benchmark items; "
            f"{summary.benchmark_items_too_short:,} more are shorter than an n-gram"
        )
    counts = summary.unusable.get("counts", {})
    if counts:
        listed = ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items()))
        console.print(f"records that cannot be used: {listed}", markup=False)
        for example in summary.unusable["examples"]:
            console.print(f"  {example}", markup=False)
    seconds = sum(summary.seconds.values())
    stages = ", ".join(f"{stage} {took:.1f}" for stage, took in summary.seconds.items())
    console.print(
        f"{seconds:.1f} s ({stages}), {summary.characters / 1e6 / max(seconds, 1e-9):.1f} million characters/s"
    )


def draw(file: BinaryIO, summary: DedupSummary) -> None:
    """Similarities of the compared pairs and sizes of the clusters, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    similarities, clusters = figure.subplots(1, 2)
    left = np.arange(SIMILARITY_BINS) / SIMILARITY_BINS
    heights = np.array(summary.similarity_histogram)
    colours = [_SIMILAR if edge >= summary.threshold - 1e-9 else _OTHER for edge in left]
    similarities.bar(left, heights, 1 / SIMILARITY_BINS, align="edge", color=colours)
    similarities.axvline(summary.threshold, color="black", linestyle="--", label=f"threshold {summary.threshold}")
    similarities.set(xlabel="Jaccard similarity of compared pairs", ylabel="pairs", xlim=(0, 1))
    similarities.legend()
    octaves: dict[int, int] = {}
    for size, count in sorted(summary.cluster_sizes.items()):
        octaves[size.bit_length()] = octaves.get(size.bit_length(), 0) + count
    names = [f"{1 << bits - 1}–{(1 << bits) - 1}" for bits in octaves]
    bars = clusters.bar(names, list(octaves.values()), color=_SIMILAR)
    clusters.bar_label(bars)
    clusters.set(xlabel="documents in a cluster", ylabel="clusters")
    if not names:
        clusters.text(0.5, 0.5, "no clusters", ha="center", va="center", transform=clusters.transAxes)
    removed = summary.documents - summary.kept
    figure.suptitle(
        f"removed {removed:,} of {summary.documents:,} documents ({removed / max(1, summary.documents):.1%})"
    )
    figure.savefig(file, dpi=110, format="png")
