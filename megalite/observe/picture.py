"""loss.png of a run: drawn at its end from metrics.jsonl, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.files import atomic_file
from megalite.observe.metrics import METRICS, describe_losses, final_losses, iterate_metrics

SMOOTH_FROM = 60
"""Curves of more steps than this are smoothed over a fiftieth of them; the raw values are drawn pale behind them."""
_MOST_POINTS = 4000


def smooth(values: Sequence[float]) -> np.ndarray:
    """A running median, robust to outliers; nan if there is no value. Long curves are binned."""
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        return numbers
    stride = -(-len(numbers) // _MOST_POINTS)
    bins = np.pad(numbers, (0, -len(numbers) % stride), constant_values=np.nan).reshape(-1, stride)
    half = max(1, len(bins) // 100)
    padded = np.pad(_medians(bins), half, constant_values=np.nan)
    smoothed = _medians(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1))
    return np.repeat(smoothed, stride)[: len(numbers)]


def _medians(rows: np.ndarray) -> np.ndarray:
    """The median of the finite values of each row; nan if a row has none."""
    finite = np.isfinite(rows)
    result = np.full(len(rows), np.nan)
    filled = finite.any(axis=1)
    result[filled] = np.nanmedian(np.where(finite[filled], rows[filled], np.nan), axis=1)
    return result


def draw_loss(run_dir: Path) -> None:
    """Draw run_dir/loss.png, with validation losses if there are any; does nothing if no step had a loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses, checked, tokens = [], [], [], 0.0
    for row in iterate_metrics(run_dir / METRICS):
        tokens = row.get("tokens") or tokens
        if row.get("loss") is not None:
            steps.append(row["step"])
            losses.append(row["loss"])
        if row.get("validation_loss") is not None:
            checked.append((row["step"], row["validation_loss"]))
    if not losses:
        return
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(losses) > SMOOTH_FROM:
        axes.plot(steps, losses, linewidth=0.8, alpha=0.25, color="C0")
        axes.plot(steps, smooth(losses), linewidth=1.4, color="C0", label="training, running median")
    else:
        axes.plot(steps, losses, linewidth=1.2, color="C0", label="training", marker="o" if len(losses) < 3 else None)
    if checked:
        axes.plot(*zip(*checked), "o-", color="C1", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    final = describe_losses(*final_losses(losses, (loss for _, loss in checked)))
    axes.set_title(f"{tokens / 1e6:,.2f} M tokens, {final}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(run_dir / "loss.png", durable=False) as file:
        figure.savefig(file, format="png")
