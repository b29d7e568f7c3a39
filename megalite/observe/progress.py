"""What rank 0 shows while it trains: a bar with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from megalite.observe.metrics import StepMetrics

if TYPE_CHECKING:
    from rich.progress import Progress


def describe(metrics: StepMetrics) -> str:
    """Loss, norm, rate and speed of a step in one short line."""
    parts = [
        f"loss {metrics.loss:.4f}",
        f"grad {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"{metrics.tflops_per_device:.3g} TFLOP/s a device",
    ]
    if metrics.mfu is not None:
        parts.append(f"MFU {metrics.mfu:.1%}")
    if metrics.validation_loss is not None:
        parts.append(f"validation {metrics.validation_loss:.4f}")
    return "  ".join(parts)


class ProgressDisplay:
    """A rich progress bar where standard error is a terminal, otherwise one line every `interval` steps."""

    def __init__(self, first: int, last: int, interval: int) -> None:
        self.first, self.last, self.interval = first, last, interval
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = _make_bar()
            self._task = self._bar.add_task("", total=last, completed=first)
            self._bar.start()

    def show(self, metrics: StepMetrics) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, description=describe(metrics))
            return
        if metrics.step % self.interval and metrics.step != self.last and metrics.validation_loss is None:
            return
        done = metrics.step - self.first
        left = (time.monotonic() - self._started) / done * (self.last - metrics.step)
        line = f"step {metrics.step}/{self.last}  {describe(metrics)}  left {timedelta(seconds=round(left))}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _make_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    )
