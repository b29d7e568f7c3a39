"""Roll call: which ranks of a job still respond, through the job's store.

There are two triggers. A rank whose communication has failed asks at once. But with NCCL no wait fails: the host blocks
in a copy from the device until NCCL's watchdog kills the process silently. So a thread on every rank also calls the
roll once a step has lasted 0.9 of the timeout, before the watchdog acts. A process that is alive answers even if its
main thread hangs, and reports where that thread is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megalite.mesh import Mesh
from megalite.observe.events import EventLog

log = logging.getLogger("megalite")

_ANSWER_SECONDS = 5.0
"""How long a roll call waits: peers notice a loss at about the same time, within a collective's timeout granularity."""
_STORE_SECONDS = 3.0
"""Extra time for a responsive store to answer."""
_CALL_SHARE, _ANSWER_SHARE = 0.9, 0.08
"""Fractions of the timeout: when the thread calls the roll, and how long it waits for answers."""
_PACKAGE = Path(__file__).resolve().parents[1]


class RollCall:
    """One rank's part in roll calls; `beat` once a step, `close` at the end."""

    def __init__(self, mesh: Mesh, timeout_seconds: float, events: EventLog) -> None:
        self.mesh, self.timeout, self.events = mesh, timeout_seconds, events
        self._store = dist.distributed_c10d._get_default_store() if mesh.size > 1 else None
        self._step, self._since = 0, time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._told: list[int] = []

    def beat(self) -> None:
        """Record the beginning of a step, the same on all ranks."""
        self._step, self._since = self._step + 1, time.monotonic()
        if self._store is not None and self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="roll call", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._over.set()

    def after_failure(self, ended: Callable[[], bool]) -> None:
        """After a failed communication: report the ranks that do not answer because they are dead or hang.

        Gives up without a result once `ended()`: a launcher that ends this rank already knows which one died.
        """
        self.close()
        if self._store is None:
            return
        found = self._bounded(lambda: self._ask("failed", "1", _ANSWER_SECONDS, ended), _ANSWER_SECONDS)
        missing = [] if ended() else sorted(set(range(self.mesh.size)) - found.keys())
        self._tell(missing, found)

    def _listen(self) -> None:
        """The thread: watches the age of the step, whatever the main thread is blocked in."""
        called = 0
        while not self._over.wait(min(1.0, self.timeout / 50)):
            step, since = self._step, self._since
            if step != called and time.monotonic() - since > _CALL_SHARE * self.timeout:
                called = step
                self._call(step)

    def _call(self, step: int) -> None:
        seconds, place = min(_ANSWER_SECONDS, _ANSWER_SHARE * self.timeout), _where_main_stands()
        found = self._bounded(lambda: self._ask(f"step {step}", place, seconds, self._over.is_set), seconds)
        if self._over.is_set():
            return
        missing = sorted(set(range(self.mesh.size)) - found.keys())
        self._tell(missing, found)
        if not missing and self.mesh.rank == min(found):
            places: dict[str, list[int]] = {}
            for rank, place in sorted(found.items()):
                places.setdefault(place, []).append(rank)
            said = "; ".join(f"rank {', '.join(map(str, ranks))} in {place}" for place, ranks in places.items())
            log.warning("no step has ended for %.0f s, but all ranks answer: %s", _CALL_SHARE * self.timeout, said)

    def _tell(self, missing: list[int], found: dict[int, str]) -> None:
        if not missing or not found or missing == self._told:
            return
        self._told = missing
        log.error("no answer from rank %s: dead or hung", ", ".join(map(str, missing)))
        # Rank 0, which normally writes events, may be the lost one: the lowest rank that answers writes.
        self.events.is_writer = self.mesh.rank == min(found)
        self.events.write("no_answer", ranks=missing)

    def _bounded(self, ask: Callable[[], dict[int, str]], seconds: float) -> dict[int, str]:
        """`ask` in a thread: the store may be in rank 0's process and hang with it, so that the call never returns."""
        found: list[dict[int, str]] = []
        caller = threading.Thread(target=lambda: found.append(ask()), name="roll call, asking", daemon=True)
        caller.start()
        caller.join(seconds + _STORE_SECONDS)
        return found[0] if found else self._all_but_the_first()

    def _all_but_the_first(self) -> dict[int, str]:
        return dict.fromkeys(range(1, self.mesh.size), "")

    def _ask(self, call: str, answer: str, seconds: float, ended: Callable[[], bool]) -> dict[int, str]:
        """The answers of the ranks that arrive in time."""
        store, everyone = self._store, range(self.mesh.size)
        assert store is not None
        found: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        try:
            store.set(f"megalite/{call}/{self.mesh.rank}", answer)
            while len(found) < self.mesh.size and time.monotonic() < deadline and not ended():
                for rank in everyone:
                    if rank not in found and store.check([f"megalite/{call}/{rank}"]):
                        found[rank] = store.get(f"megalite/{call}/{rank}").decode(errors="replace")
                time.sleep(0.1)
        except (RuntimeError, OSError):  # the store died with the process that served it
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            return dict.fromkeys(everyone, "") if agent else self._all_but_the_first()
        return found


def _where_main_stands() -> str:
    """The innermost frame of megalite's code on the main thread's stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        with contextlib.suppress(ValueError):
            file = Path(frame.f_code.co_filename).relative_to(_PACKAGE)
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "code that is not megalite's"
