"""Rank 0's progress display: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from megalite.observe.metrics import StepMetrics

if TYPE_CHECKING:
    from rich.live import Live

log = logging.getLogger("megalite")

_RATE_STEPS = 200
"""Steps used to estimate the time left: the first of a start may have compiled kernels or read cold files."""
_LONGEST_LEFT = 9999 * 86400.0
_BAR = 16
_OBJECTIVES = {"reward_mean": "reward", "kl": "KL", "accuracy": "accuracy", "margin": "margin"}
"""Numbers of some objectives that belong beside the loss, and what to call them."""


def describe(metrics: StepMetrics) -> list[str]:
    """A step's metrics as short strings, most important first: a narrow terminal drops the last ones."""
    parts = [f"loss {metrics.loss:.4f}" if math.isfinite(metrics.loss) else "no loss"]
    if metrics.validation_loss is not None and math.isfinite(metrics.validation_loss):
        parts.append(f"validation {metrics.validation_loss:.4f}")
    parts += [f"{word} {metrics.extra[name]:.3f}" for name, word in _OBJECTIVES.items() if name in metrics.extra]
    parts += [
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"grad {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
        f"{metrics.tflops_per_device:.3g} TFLOP/s per device",
    ]
    if metrics.mfu is not None:
        parts.append(f"MFU {metrics.mfu:.1%}")
    return parts


def fit(parts: Sequence[str], width: int) -> str:
    """The leading parts that fit on a line; the first is truncated if necessary."""
    line = parts[0][:width]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


class ProgressDisplay:
    """A live line if standard error is a terminal, otherwise one line every `interval` steps."""

    def __init__(self, last: int, interval: int) -> None:
        self.last, self.interval = last, interval
        self._moments = deque([time.monotonic()], maxlen=_RATE_STEPS + 1)
        self._parts = [f"step 0/{last}"]
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = self._start_live()

    def _start_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console, terminal = Console(stderr=True), sys.stderr

        def render() -> Text:
            return Text(fit(self._parts, console.width - 1), no_wrap=True, overflow="crop")

        live = Live(get_renderable=render, console=console, redirect_stdout=False)
        live.start()
        _redirect_log(terminal, sys.stderr)  # messages then go above the line, which is drawn again below them
        return live

    def show(self, metrics: StepMetrics) -> None:
        self._moments.append(time.monotonic())
        step = f"step {metrics.step}/{self.last}"
        left = f"left {timedelta(seconds=round(self._seconds_left(metrics.step)))}"
        if self._live is not None:
            done = min(_BAR, round(_BAR * metrics.step / max(self.last, 1)))
            loss, *rest = describe(metrics)
            self._parts = [step, left, loss, "━" * done + "─" * (_BAR - done), *rest]
        elif metrics.step % self.interval == 0 or metrics.step == self.last or metrics.validation_loss is not None:
            print("  ".join([step, left, *describe(metrics)]), file=sys.stderr, flush=True)

    def _seconds_left(self, step: int) -> float:
        """Estimated from the steps of this start, including those repeated after a rollback."""
        a_step = (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)
        return min(a_step * max(0, self.last - step), _LONGEST_LEFT)

    def close(self) -> None:
        if self._live is not None:
            redirected = sys.stderr
            self._live.stop()
            _redirect_log(redirected, sys.stderr)
            self._live = None


def _redirect_log(old: object, new: object) -> None:
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)
