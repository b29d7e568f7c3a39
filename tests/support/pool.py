"""One pool of worker processes that serves every multi-process test.

Workers come from a fork server that has torch loaded and has never computed, so a worker starts in milliseconds and
inherits no threads. Each run gets a fresh gloo process group over a file in a temporary directory, and nothing is left
of it afterwards; a run that fails or hangs takes its workers with it, and the next run starts with new ones.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.patience import PATIENCE_SECONDS

PRELOADED = [
    "torch",
    "torch.distributed",
    "torch.fx.experimental.symbolic_shapes",
    "numpy",
    "megalite.train.trainer",
    "tests.support.pool",
]

GRACE_SECONDS = 1.0
"""What the ranks that have not reported yet get once another has failed."""


class WorkerError(AssertionError):
    """A rank raised, died or hung; the message holds its rank and its traceback."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    stacks: Path


@dataclass(frozen=True)
class _Report:
    """What a worker sends back: its result, or the traceback of what it raised, and when."""

    result: Any
    failure: str | None
    moment: float


class Pool:
    """`size` workers; `run` uses the first `world_size` of them."""

    def __init__(self, size: int = 4, timeout: float = PATIENCE_SECONDS) -> None:
        self.size = size
        self.timeout = timeout
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._directory = tempfile.TemporaryDirectory(prefix="megalite-pool-")
        self._workers: list[_Worker] = []
        self._runs = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `function(rank, *args)` on each rank of a gloo world; the results in rank order.

        `function` must be importable by name (a module-level function). Arguments and results travel by pickle.
        Raises WorkerError with the traceback of the rank that failed first, or the stacks of the ranks that hang.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size = {world_size} is outside 1 to {self.size}, the size of the pool")
        self._start()
        self._runs += 1
        store = str(Path(self._directory.name) / f"store{self._runs}")
        deadline = time.monotonic() + (timeout or self.timeout)
        for rank, worker in enumerate(self._workers[:world_size]):
            job = pickle.dumps((function, args))
            worker.connection.send_bytes(
                pickle.dumps((sys.path, job, rank, world_size, store, timeout or self.timeout))
            )
        reports = self._collect(world_size, deadline)
        failures = [(report.moment, rank) for rank, report in reports.items() if report.failure]
        if not failures:
            return [reports[rank].result for rank in range(world_size)]
        self.stop()
        _, first = min(failures)
        raise WorkerError(f"rank {first} of {world_size} failed:\n{reports[first].failure}")

    def stop(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
        self._workers = []

    def close(self) -> None:
        self.stop()
        self._directory.cleanup()

    def _start(self) -> None:
        if any(not worker.process.is_alive() for worker in self._workers):
            self.stop()
        for index in range(len(self._workers), self.size):
            ours, theirs = self._context.Pipe()
            stacks = Path(self._directory.name) / f"stacks{index}"
            process = self._context.Process(target=_work, args=(theirs, str(stacks)), name=f"rank{index}")
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, stacks))

    def _collect(self, world_size: int, deadline: float) -> dict[int, _Report]:
        """Every rank's report; once one has failed, the others, which may wait for it for ever, get a grace."""
        reports: dict[int, _Report] = {}
        ranks = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        failed = False
        while ranks:
            ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
            if not ready and failed:
                break
            if not ready:
                self._raise_hung(sorted(ranks.values()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks.pop(connection)
                reports[rank] = self._receive(connection, rank)
                if reports[rank].failure and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        return reports

    def _receive(self, connection: Connection, rank: int) -> _Report:
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._workers[rank].process.join(5)
            code = self._workers[rank].process.exitcode
            return _Report(None, f"its process ended without a word, exit code {code}", time.monotonic())

    def _raise_hung(self, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self._workers[rank].process.pid, signal.SIGUSR2)
        time.sleep(0.5)
        stacks = "\n".join(f"--- rank {rank}\n{self._workers[rank].stacks.read_text()}" for rank in ranks)
        self.stop()
        raise WorkerError(f"ranks {ranks} did not finish in time; they were at:\n{stacks}")


def _work(connection: Connection, stacks: str) -> None:
    """The life of a worker: one job after the other, until the test process closes its end."""
    import torch

    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not resolve
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test process's business
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=False)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            connection.send_bytes(_serve(message))


def _serve(message: bytes) -> bytes:
    """Run one job in a process group of its own; the pickled report."""
    import torch.distributed as dist

    path, job, rank, world_size, store, timeout = pickle.loads(message)
    try:
        sys.path[:] = path
        importlib.invalidate_caches()
        function, args = pickle.loads(job)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=2 * timeout),  # the test process, which can tell who hangs, is to be first
        )
        report = pickle.dumps(_Report(function(rank, *args), None, time.monotonic()))
        dist.barrier()  # a rank that is done does not close its connections while others still talk
        dist.destroy_process_group()
    except BaseException:
        return pickle.dumps(_Report(None, traceback.format_exc(), time.monotonic()))
    return report
