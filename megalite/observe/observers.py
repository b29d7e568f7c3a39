"""All observers of a run, called through one place: metrics, trackers, timelines, profiles, progress, events, plots.

An observer may fail in any way: a full disk, a deleted folder, a network, a bug in a library. Its exceptions are logged
once as a warning and go no further: an observer never changes what a run does, how it ends, or which error is seen.
Each one is closed even if others fail.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from megalite.config import Config
from megalite.mesh import Mesh
from megalite.observe.events import EventLog, read_events
from megalite.observe.goodput import account, describe_goodput
from megalite.observe.metrics import MetricsFile, StepMetrics
from megalite.observe.picture import draw_loss
from megalite.observe.progress import ProgressDisplay, describe
from megalite.observe.timeline import Recorder
from megalite.observe.trackers import TensorBoard, Tracker, WeightsAndBiases

log = logging.getLogger("megalite")
Result = TypeVar("Result")


class Guard:
    """Calls functions that may fail. The first failure of each name is logged."""

    def __init__(self, who: str) -> None:
        self.who = who
        self._failed: set[str] = set()

    def call(self, name: str, action: Callable[..., Result], *arguments: Any, **named: Any) -> Result | None:
        """The result of `action`; None if it raises."""
        try:
            return action(*arguments, **named)
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                why = next(iter(str(error).strip().splitlines()), "")
                log.warning("%s: %s failed (%s: %s); training goes on", self.who, name, type(error).__name__, why)
            return None

    @contextlib.contextmanager
    def around(self, name: str, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """`with make():`, where only the body can raise."""
        with contextlib.ExitStack() as stack:
            self.call(name, lambda: stack.enter_context(make()))
            leave = stack.pop_all()
        try:
            yield
        except BaseException as error:
            # The observer sees the error and may log it, but can neither swallow nor replace it.
            self.call(name, leave.__exit__, type(error), error, error.__traceback__)
            raise
        self.call(name, leave.close)


class Observers:
    """One rank's observers. Until `begin`, only events are written."""

    def __init__(self, config: Config, mesh: Mesh, events: EventLog) -> None:
        self.config, self.mesh, self.events = config, mesh, events
        self.run_dir = Path(config.run.dir)
        self.recorder = Recorder(mesh, self.run_dir)
        self.guard = Guard(f"rank {mesh.rank}")
        self._around: dict[str, Callable[[int], AbstractContextManager[None]]] = {"timeline": self.recorder.step}
        self._metrics: MetricsFile | None = None
        self._trackers: dict[str, Tracker] = {}
        self._display: ProgressDisplay | None = None

    def wrap_steps(self, name: str, make: Callable[[], Callable[[int], AbstractContextManager[None]]]) -> None:
        """Wrap each step in the context manager `make()(step number)`, outside of the existing ones."""
        if (step := self.guard.call(name, make)) is not None:
            self._around = {name: step} | self._around

    def begin(self, step: int, last: int) -> None:
        """Start observing a run that is at `step` and ends at `last`. Rank 0 opens its files and its display."""
        if self.mesh.rank > 0:
            return
        self._metrics = MetricsFile(self.run_dir)
        self.rewind(step)
        if self.config.log.tensorboard:
            self._track("TensorBoard", lambda: TensorBoard(self.run_dir / "tensorboard", step + 1))
        if self.config.log.wandb:
            self._track("Weights & Biases", lambda: WeightsAndBiases(self.config))
        self._display = self.guard.call("progress display", ProgressDisplay, last, self.config.log.interval)

    def _track(self, name: str, make: Callable[[], Tracker]) -> None:
        if (tracker := self.guard.call(name, make)) is not None:
            self._trackers[name] = tracker

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context around each training step."""
        with contextlib.ExitStack() as stack:
            for name, observe in self._around.items():
                stack.enter_context(self.guard.around(name, lambda observe=observe: observe(number)))  # type: ignore[misc]
            yield

    def event(self, kind: str, **facts: Any) -> None:
        self.guard.call("events", self.events.write, kind, **facts)

    def rewind(self, step: int) -> None:
        """Remove the rows of steps that will be repeated; their duration is recorded as an event."""
        if self._metrics is None:
            return
        dropped = self.guard.call("metrics", self._metrics.rewind, step)
        if dropped:
            spent = [row.get(name) for row in dropped for name in ("step_seconds", "save_stall_seconds")]
            seconds = sum(value for value in spent if isinstance(value, int | float) and math.isfinite(value))
            until = dropped[-1].get("time")
            self.event("lost", to_step=step, steps=len(dropped), seconds=round(seconds, 3), until=until)

    def report(self, metrics: StepMetrics) -> None:
        """Report a finished step. Rank 0 writes it everywhere."""
        if self._metrics is None:
            return
        self.guard.call("metrics", self._metrics.write, metrics)
        for name, tracker in self._trackers.items():
            self.guard.call(name, tracker.write, metrics.step, metrics.numbers())
        if self._display is not None:
            self.guard.call("progress display", self._display.show, metrics)
        if metrics.step % self.config.log.interval == 0:
            log.debug("step %d  %s", metrics.step, "  ".join(describe(metrics)))

    def tell_goodput(self) -> None:
        """Log how much of the time since the first start went into training."""
        if self._metrics is not None:
            self.guard.call("effective training time", self._tell_goodput, self._metrics)

    def _tell_goodput(self, metrics: MetricsFile) -> None:
        goodput = account(read_events(self.run_dir), metrics, time.time())
        if goodput is not None:
            log.info("%s", describe_goodput(goodput))

    def close_display(self) -> None:
        """Close the progress display, so that later log lines appear below it."""
        if self._display is not None:
            self.guard.call("progress display", self._display.close)
            self._display = None

    def close(self) -> None:
        """Close all observers and draw the loss curve. Idempotent."""
        self.close_display()
        self.guard.call("timeline", self.recorder.close)
        if self._metrics is not None:
            self.guard.call("metrics", self._metrics.close)
            self.guard.call("loss.png", draw_loss, self.run_dir)
            self._metrics = None
        while self._trackers:
            name, tracker = self._trackers.popitem()
            self.guard.call(name, tracker.close)
