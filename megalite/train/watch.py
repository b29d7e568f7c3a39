"""Watching over the other ranks: who hangs, who is gone, who is slow.

A rank that loses its peers answers a roll call in the job's store; whoever does not answer is the suspect. A watchdog
in C writes the stack of a rank that stays in one step for too long into that rank's log, hung or not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megalite.mesh import Mesh

_ANSWER_SECONDS = 5.0
"""How long a roll call waits: peers notice a loss at about the same time, within a collective's timeout granularity."""


class Watch:
    """One rank's watch; `beat` once a step."""

    def __init__(self, mesh: Mesh, run_dir: str, timeout_seconds: float) -> None:
        self.mesh, self.timeout = mesh, timeout_seconds
        self._path = Path(run_dir) / "log" / f"rank_{mesh.rank:05d}.stack"
        self._store = dist.distributed_c10d._get_default_store() if mesh.size > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Watch]:
        """Write this rank's stack to log/rank_N.stack when a step outlasts the timeout."""
        if self._store is None:
            yield self
            return
        with self._path.open("w") as file:
            self._file = file
            try:
                self.beat(0)
                yield self
            finally:
                faulthandler.cancel_dump_traceback_later()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def beat(self, step: int) -> None:
        """A step has begun: wind the watchdog up again."""
        if self._store is not None:
            # Earlier than the collectives' own timeout, so that the hung rank's stack shows where it hangs.
            faulthandler.dump_traceback_later(0.8 * self.timeout, file=self._file)

    def roll_call(self) -> list[int]:
        """After a communication has failed: the ranks that do not answer, because they are dead or hang."""
        if self._store is None:
            return []
        try:
            self._store.set(f"megalite/present/{self.mesh.rank}", "1")
            deadline = time.monotonic() + _ANSWER_SECONDS
            missing = list(range(self.mesh.size))
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not self._store.check([f"megalite/present/{rank}"])]
                time.sleep(0.1)
            return missing
        except (RuntimeError, OSError):  # the store went down with its host
            return []
