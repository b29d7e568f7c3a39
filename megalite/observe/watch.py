"""Watching the ranks: which are hung, lost or slow.

A rank that does not answer a roll call is the suspect (`megalite.observe.roll_call`). A watchdog in C (`faulthandler`)
writes the stack of a rank that stays in one step for too long to a file beside that rank's log, hung or not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

import torch

from megalite.mesh import Mesh
from megalite.observe.events import EventLog
from megalite.observe.roll_call import RollCall
from megalite.observe.slow import Comparison, compare_ranks

log = logging.getLogger("megalite")

_WARM_STEPS = 3
"""Steps of a start after which `timeout_seconds` replaces the longer start-up timeout."""
_REPORT_STEPS = 50
"""Steps over which the median of a rank's work is taken to compare ranks."""


class Watch:
    """One rank's watch; `beat` once a step."""

    def __init__(self, mesh: Mesh, run_dir: str, timeout_seconds: float, events: EventLog) -> None:
        self.mesh, self.timeout, self.events = mesh, timeout_seconds, events
        self.roll_call = RollCall(mesh, timeout_seconds, events)
        self._steps = 0
        self._file: TextIO | None = None
        self._path = Path(run_dir) / "log" / f"rank_{mesh.rank:05d}.stack"

    @contextlib.contextmanager
    def listening(self) -> Iterator[Watch]:
        """Write this rank's stack to log/rank_N.stack when a step outlasts the timeout."""
        try:
            yield self
        finally:
            self.roll_call.close()
            faulthandler.cancel_dump_traceback_later()
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                    if self._path.stat().st_size == 0:
                        self._path.unlink()

    def beat(self) -> None:
        """Record the beginning of a step and reset the watchdogs."""
        self._steps += 1
        if self.mesh.size == 1 or self._steps < _WARM_STEPS:
            return
        if self._steps == _WARM_STEPS:
            self.mesh.set_timeout(self.timeout)
            self._open()
        self.roll_call.beat()
        if self._file is not None:
            # Before the collectives' own timeout, so that the stack shows where the rank hangs.
            faulthandler.dump_traceback_later(0.8 * self.timeout, file=self._file)

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
        except OSError as error:
            log.warning("rank %d: %s cannot be written (%s)", self.mesh.rank, self._path, error.strerror)

    def compare(self, step: int, work_seconds: Collection[float]) -> None:
        """Collective, every 50 steps: log the rank whose own work, without waits, takes longest.

        `work_seconds` are those of this rank's latest steps; their median is compared, so one long step has no effect.
        """
        if self.mesh.size == 1 or step % _REPORT_STEPS:
            return
        work = statistics.median(list(work_seconds)[-_REPORT_STEPS:]) if work_seconds else 0.0
        world = self.mesh.world
        seconds = torch.zeros(world.size, dtype=torch.float64, device=self.mesh.device)
        world.all_gather(seconds, seconds.new_tensor([work])).wait()
        if self.mesh.rank == 0:
            stages = {rank: rank // (world.size // self.mesh.pp) for rank in range(world.size)}
            compared = compare_ranks(dict(enumerate(seconds.tolist())), stages)
            if compared:
                self._tell(step, max(compared, key=lambda each: each.ratio))

    def _tell(self, step: int, slowest: Comparison) -> None:
        level = logging.WARNING if slowest.slow else logging.DEBUG
        line = "step %d: rank %d works longest, %.3f s a step where the median of its peers is %.3f s"
        log.log(level, line, step, slowest.rank, slowest.seconds, slowest.usual)
        if slowest.slow:
            took = {"seconds": round(slowest.seconds, 6), "median": round(slowest.usual, 6)}
            self.events.write("slow", step=step, rank=slowest.rank, **took)
