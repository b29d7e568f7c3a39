"""Watching over the other ranks: who hangs, who is gone, who is slow.

A rank that loses its peers answers a roll call in the job's store; whoever does not answer is the suspect. A watchdog
in C writes the stack of a rank that stays in one step for too long into that rank's log, hung or not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from megalite.mesh import Mesh
from megalite.observe.events import EventLog
from megalite.observe.slow import Comparison, compare_ranks

log = logging.getLogger("megalite")

_WARM_STEPS = 3
"""After so many steps of a start, `timeout_seconds` takes the place of start-up's patience."""
_REPORT_STEPS = 50
"""Steps over which a rank's median work is taken before ranks are compared."""
_ANSWER_SECONDS = 5.0
"""How long a roll call waits: peers notice a loss at about the same time, within a collective's timeout granularity."""
_STORE_SECONDS = 3.0
"""What a store that answers needs beyond that."""


class Watch:
    """One rank's watch; `beat` once a step."""

    def __init__(self, mesh: Mesh, run_dir: str, timeout_seconds: float, events: EventLog) -> None:
        self.mesh, self.timeout, self.events = mesh, timeout_seconds, events
        self._steps = 0
        self._file: TextIO | None = None
        self._path = Path(run_dir) / "log" / f"rank_{mesh.rank:05d}.stack"
        self._store = dist.distributed_c10d._get_default_store() if mesh.size > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Watch]:
        """Write this rank's stack to log/rank_N.stack when a step outlasts the timeout."""
        if self._store is None:
            yield self
            return
        try:
            self._file = self._path.open("w")
        except OSError as error:
            log.warning("rank %d: %s cannot be written (%s)", self.mesh.rank, self._path.name, error.strerror)
            yield self
            return
        try:
            yield self
        finally:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                self._file.close()
                if self._path.stat().st_size == 0:
                    self._path.unlink()

    def beat(self) -> None:
        """A step has begun: wind the watchdog up again."""
        self._steps += 1
        if self._store is not None and self._steps == _WARM_STEPS:
            self.mesh.set_timeout(self.timeout)
        if self._file is not None and self._steps >= _WARM_STEPS:
            # Earlier than the collectives' own timeout, so that the hung rank's stack shows where it hangs.
            faulthandler.dump_traceback_later(0.8 * self.timeout, file=self._file)

    def compare(self, step: int, work_seconds: Collection[float]) -> None:
        """Every 50 steps, all ranks together: name the rank whose own work, without its waits, takes longest.

        `work_seconds` are those of this rank's latest steps; the median counts, so that one long step does not.
        """
        if self._store is None or step % _REPORT_STEPS:
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

    def roll_call(self, ended: Callable[[], bool]) -> list[int]:
        """After a communication has failed: the ranks that do not answer, because they are dead or hang.

        Broken off with no answer once `ended()`: a launcher that ends this rank knows already who died.
        """
        if self._store is None:
            return []
        # The store may live in rank 0, and hang with it: then the calling thread never comes back.
        present: list[set[int]] = []
        caller = threading.Thread(target=lambda: present.append(self._call(ended)), name="roll call", daemon=True)
        caller.start()
        caller.join(_ANSWER_SECONDS + _STORE_SECONDS)
        everyone = set(range(self.mesh.size))
        answered = present[0] if present else everyone - {0}
        missing = [] if ended() else sorted(everyone - answered)
        if missing and answered:
            # Rank 0, whose word it is, may be the one that is gone: the lowest that answers tells.
            self.events.speaks = self.mesh.rank == min(answered)
            self.events.write("no_answer", ranks=missing)
        return missing

    def _call(self, ended: Callable[[], bool]) -> set[int]:
        """The ranks that come within the time; all of them where the store is down and nobody can be asked."""
        store, everyone = self._store, set(range(self.mesh.size))
        assert store is not None
        present: set[int] = set()
        try:
            store.set(f"megalite/present/{self.mesh.rank}", "1")
            deadline = time.monotonic() + _ANSWER_SECONDS
            while present < everyone and time.monotonic() < deadline and not ended():
                present |= {rank for rank in everyone - present if store.check([f"megalite/present/{rank}"])}
                time.sleep(0.1)
        except (RuntimeError, OSError):  # the store went down with its host
            return everyone
        return present
