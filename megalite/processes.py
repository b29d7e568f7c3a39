"""Child processes of a launcher: they hear every request that it gets, and do not outlive it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from megalite.errors import FAULT, FINISHED, INTERRUPTED, STOPPED, UNUSABLE

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a job to end."""

GPU_ENVIRONMENT = {"TORCH_NCCL_HIGH_PRIORITY": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""For ranks on GPUs: communication is not queued behind a GEMM that fills the device, and memory does not fragment."""

_GRACE_SECONDS, _START_UP_GRACE_SECONDS = 30.0, 5.0
"""Grace period for the other processes once one has failed, or was stopped during start-up."""
_POLL_SECONDS = 0.05
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def end_with_parent(parent: int) -> None:
    """On Linux: have SIGTERM sent to this process when `parent`, which started it, dies; at once if it is dead."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before the kernel knew of our wish
            os.kill(os.getpid(), signal.SIGTERM)


class Processes:
    """The children of this process, started and awaited within `listening`."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self._children: list[subprocess.Popen[str]] = []

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            number = signal.SIGTERM  # a closed terminal is a reason to save and stop
        again = number == signal.SIGINT and signal.SIGINT in self.requests
        self.requests.append(number)
        self._send(signal.SIGKILL if again else number)

    def _send(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hand requests on to the children; none of them is left behind."""
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # nohup
        previous = {number: signal.signal(number, self._handle) for number in REQUESTS if number not in ignored}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        try:
            yield
        finally:
            self._send(signal.SIGKILL)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """`subprocess.Popen` of a child in a process group of its own, so that Ctrl-C reaches it through us alone."""
        parent = os.getpid()

        def before_exec() -> None:
            for number in REQUESTS:  # our handlers are still there, and would forget a signal that comes before exec
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, signal.SIG_DFL)
            end_with_parent(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

        # A request that comes meanwhile waits until the child is one of ours.
        signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        try:
            child = subprocess.Popen(command, text=True, process_group=0, preexec_fn=before_exec, **options)
            self._children.append(child)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        return child

    def wait(self) -> list[tuple[int, int]]:
        """Until all have ended: (place in the order of starts, code) in the order of ends.

        A code is negative where a signal ended the process. Once one has failed the others are asked to end, and made
        to; what they then die of is left out.
        """
        left, ends = dict(enumerate(self._children)), list[tuple[int, int]]()
        deadline, sent = float("inf"), set[int]()
        while left:
            for place, child in list(left.items()):
                code = child.poll()
                if code is None:
                    continue
                del left[place]
                if -code not in sent:
                    ends.append((place, code))
                if code != FINISHED and deadline == float("inf"):
                    died_early = -code in self.requests
                    deadline = time.monotonic() + (_START_UP_GRACE_SECONDS if died_early else _GRACE_SECONDS)
                    if code not in (STOPPED, INTERRUPTED):
                        sent.add(signal.SIGTERM)
                        self._send(signal.SIGTERM)
            if left and time.monotonic() > deadline:
                sent.add(signal.SIGKILL)
                self._send(signal.SIGKILL)
            time.sleep(_POLL_SECONDS if left else 0)
        self._children.clear()
        return ends


def run_ranks(
    processes: Processes, command: Sequence[str], count: int, environment: Mapping[str, str], logs: Path | None = None
) -> list[tuple[int, int]]:
    """Start the ranks of a job on this machine and wait for all of them: (rank, code) as they end.

    `logs` is a folder for what they print, `output_<rank>.log`; without it they print where this process does.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as store:
        place = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1])}
        for rank in range(count):
            if processes.requests:
                break
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                own["MEGALITE_STORE_SOCKET"] = str(store.fileno())
            descriptors = [store.fileno()] if rank == 0 else []
            with contextlib.ExitStack() as stack:
                options: dict[str, Any] = {}
                if logs is not None:
                    output = stack.enter_context((logs / f"output_{rank:05d}.log").open("wb"))
                    options = {"stdout": output, "stderr": output}
                processes.start(command, env={**environment, **place, **own}, pass_fds=descriptors, **options)
    return processes.wait()


def outcome(codes: Collection[int], requests: Collection[int]) -> int:
    """The exit code of the whole, from those of its processes (see `Processes.wait`) and what they were asked.

    A process that dies of a request did not listen yet: a stop with nothing to save.
    """
    if UNUSABLE in codes:
        return UNUSABLE
    if signal.SIGINT in requests or INTERRUPTED in codes:
        return INTERRUPTED
    for code in codes:
        if code not in (FINISHED, STOPPED) and -code not in requests:
            return code if code > 0 else FAULT
    if codes and set(codes) == {FINISHED}:
        return FINISHED
    return STOPPED if codes or requests else FAULT
