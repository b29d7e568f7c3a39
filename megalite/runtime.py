"""The process around a run: its rank, connecting to the others, signals, logging, and exit.

Importing this module does not import torch: signal handlers must be installed from the first moment of a process, and
torch alone takes seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import logging.handlers
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megalite.affinity import pci_address, stay_near
from megalite.errors import INTERRUPTED, STOPPED, UserError

if TYPE_CHECKING:
    import torch

    from megalite.config import Config
    from megalite.mesh import Mesh

STARTUP_TIMEOUT_SECONDS = 1800.0
"""Timeout of communications in the first steps, when some ranks still build data indices or compile kernels;
`train.timeout_seconds` applies afterwards."""

SILENCE_SECONDS = 15.0
"""How long ranks other than 0 delay a user error before the process group exists: rank 0 will report it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_PATIENCE_SECONDS = 5.0
"""How long a rank that lost a peer waits before it reports that: the launcher may be about to end it, and the peer's
own message is the useful one."""

_INTERRUPT_SECONDS = 1.0
"""How long Ctrl-C may take to reach a main thread that is blocked in a library before the process exits anyway."""

_PARENT_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""

log = logging.getLogger("megalite")


# This rank


@dataclass(frozen=True)
class World:
    """This process's rank and the job's size, from torchrun's or SLURM's environment; alone without either."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> World:
        """Raises UserError if the variables are not numbers or contradict each other."""
        for rank, size, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ):
            if rank not in environment or size not in environment:
                continue
            world = World(
                *(_number_in(environment, name, default) for name, default in ((rank, ""), (size, ""), (local, "0")))
            )
            if not world.rank < world.size:
                raise UserError(f"{rank} = {world.rank} is not below {size} = {world.size}; ranks count from 0")
            if world.size > 1 and not environment.get("MASTER_ADDR"):
                if rank == "SLURM_PROCID":
                    return World()  # an interactive shell inside an allocation, not a launched task
                raise UserError(f"MASTER_ADDR is not set for {world.size} ranks; start them with torchrun or SLURM")
            if world.size > 1:
                _number_in(environment, "MASTER_PORT", "")
            return world
        return World()


def _number_in(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(
            f"{name} = {text[:40]!r} in the environment is not a number; start the ranks with torchrun or SLURM, or "
            f"unset {name} to run one process"
        )
    return int(text)


def follow_launcher(world: World) -> None:
    """On Linux: receive SIGTERM when the launcher dies, so that killing it leaves no orphans behind.

    If the launcher died before this call, no signal comes: this process then exits at once.
    """
    if world.size == 1 or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
    if _orphaned(os.environ, os.getppid()):
        leave(STOPPED)


def _orphaned(environment: Mapping[str, str], parent: int) -> bool:
    """Whether torchrun is gone and the system's init has adopted this process.

    torchrun runs its workers with its own interpreter, and may itself be process 1 of a container.
    """
    if parent != 1 or "TORCHELASTIC_RUN_ID" not in environment:
        return False
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{parent}/exe") != os.readlink("/proc/self/exe")
    return True


# Requests to stop


class StoppedEarly(Exception):
    """A stop request came before there was anything to save."""


class StopRequest:
    """Remembers SIGTERM and SIGUSR1 from the first moment of a process; the loop asks at step boundaries, when all
    ranks can agree.

    Before the ranks have met they cannot agree, and the main thread may sit in a library that returns to Python only
    after minutes. Within `at_once` a request therefore ends the process on the spot, from a thread that the signals
    wake.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._guard = threading.Lock()
        self._leave: Callable[[int], None] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """A context with signal handlers installed; also unblocks signals that the launcher has blocked."""

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number).name

        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        previous_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
        threading.Thread(target=self._heed, args=(reading,), name="stop request", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_descriptor)
            os.close(writing)

    def _heed(self, reading: int) -> None:
        """The thread: woken by every signal, even while the main thread is blocked."""
        while byte := os.read(reading, 1):
            if byte[0] in STOP_SIGNALS:
                self.signal = signal.Signals(byte[0]).name
                self._leave_if_allowed(STOPPED)
            elif byte[0] == signal.SIGINT:
                time.sleep(_INTERRUPT_SECONDS)  # the main thread answers by itself where it can
                self._leave_if_allowed(INTERRUPTED)
        os.close(reading)

    def _leave_if_allowed(self, code: int) -> None:
        with self._guard:
            if self._leave is not None:
                self._leave(code)

    @contextlib.contextmanager
    def at_once(self, world: World, clean_up: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A context in which a request exits the process with 75 after `clean_up`; raises `StoppedEarly` if one came
        before."""

        def go(code: int) -> None:
            clean_up()
            if world.rank == 0:
                print("stopped on request before training began", file=sys.stderr, flush=True)
            leave(code)

        with self._guard:
            if self.signal is not None:
                raise StoppedEarly
            self._leave = go
        try:
            yield
        finally:
            with self._guard:
                self._leave = None

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds` or until there is a request; returns whether there is one."""
        deadline = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.signal is not None

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any rank has been asked to stop. Collective."""
        import torch

        asked = torch.tensor([float(self.signal is not None)], device=mesh.device)
        mesh.world.all_reduce(asked).wait()
        return bool(asked.item())


# Connecting the ranks


def choose_device(config: Config, world: World) -> torch.device:
    """The GPU of this local rank, or the CPU: `run.device`. If each task sees only one GPU, that one."""
    import torch

    if config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), world.local_rank
    if count == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        index = 0  # the others of this machine see others: srun --gpus-per-task=1, a container for each rank
    if index >= count:
        raise UserError(
            f"local rank {world.local_rank} has no GPU: this machine has {count}; start {count} processes on it, "
            "or set run.device to cpu"
        )
    torch.cuda.set_device(index)
    stay_near(pci_address(index))
    return torch.device("cuda", index)


def connect(config: Config, world: World, device: torch.device) -> Mesh:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and build the mesh, with the start-up timeout."""
    import torch.distributed as dist

    from megalite.mesh import DATA_AXES, GroupFactory, Mesh, create_group
    from megalite.rendezvous import open_store

    timeout = timedelta(seconds=max(STARTUP_TIMEOUT_SECONDS, config.train.timeout_seconds))
    if world.size > 1:
        # Pairs of pipeline neighbours have communicators of their own: what torch warns of cannot happen.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = open_store(world.rank, world.size, timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    make_group: GroupFactory = functools.partial(create_group, timeout=timeout)
    if config.train.invariant:
        from megalite.parallel.virtual_parts import tree_groups

        make_group = tree_groups(make_group)
    parallel = config.parallel
    mesh = Mesh(
        pp=parallel.pipeline,
        dp=config.data_parallel(world.size) // parallel.expert,
        ep=parallel.expert,
        cp=parallel.context,
        tp=parallel.tensor,
        rank=world.rank,
        device=device,
        make_group=make_group,
    )
    for axes in (("tp",), ("pp",), ("cp",), DATA_AXES):  # every rank makes its groups here, in one order
        mesh.group(*axes)
    _ = mesh.world
    return mesh


# What a rank says, and how it ends


class RunLog:
    """This rank's log: on the terminal at once, and from `keep` on also in run.dir/log, including earlier lines.

    Rank 0's notices and all warnings go to the terminal. A start that is refused leaves no file.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._path = Path(config.run.dir) / "log" / f"rank_{world.rank:05d}.log"
        self._held = logging.handlers.MemoryHandler(1 << 30, logging.CRITICAL + 1, flushOnClose=False)
        self._terminal = logging.StreamHandler(sys.stderr)
        self._terminal.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
        prefix = f"[rank {world.rank}] " if world.rank else ""
        self._terminal.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        log.handlers[:] = [self._held, self._terminal]
        logging.raiseExceptions = False  # a full disk must not fill the terminal with the log's own traces
        log.setLevel(logging.INFO)
        log.propagate = False

    def keep(self) -> None:
        """Open the file: the run has been accepted."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(self._path, encoding="utf-8")
        except OSError as error:
            log.warning("%s cannot be written (%s); training goes on without it", self._path, error.strerror)
            return
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._held.setTarget(file)
        self._held.flush()
        log.handlers[:] = [file, self._terminal]


def leave(code: int) -> None:
    """Exit at once with `code`. Does not return."""
    with contextlib.suppress(OSError):
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not change the code
            stream.flush()
    # Threads that still wait for a dead peer would keep an ordinary exit from ending.
    os._exit(code)


def explain_fault(error: BaseException, world: World, stop: StopRequest) -> None:
    """Log an error: one line on the terminal, and the traceback in the rank's log (on the terminal too if there is no
    log yet). A lost peer's own message goes first."""
    trace = "".join(traceback.format_exception(error))
    files = [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
    for handler in files:
        handler.emit(logging.LogRecord("megalite", logging.ERROR, "", 0, trace, None, None))
    if world.size > 1 and isinstance(error, RuntimeError) and stop.wait(_PATIENCE_SECONDS):
        return
    summary = str(error).strip().splitlines()[0] if str(error).strip() else ""
    where = f" (trace in log/rank_{world.rank:05d}.log)" if files else ""
    if not files:
        print(trace, file=sys.stderr, end="")
    print(f"error: rank {world.rank}: {type(error).__name__}: {summary}{where}", file=sys.stderr, flush=True)
