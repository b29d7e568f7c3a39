"""The process around a run: who this rank is, how ranks find each other, what signals mean, how a process ends."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megalite.affinity import pci_address, stay_near
from megalite.config import Config
from megalite.errors import UserError
from megalite.mesh import Mesh, create_group
from megalite.rendezvous import open_store

EXIT_CODES_ENVIRONMENT = "MEGALITE_EXIT_CODES"
"""Names a directory where each rank leaves its exit code: torchrun itself makes 1 of every code but 0."""

STARTUP_TIMEOUT_SECONDS = 1800.0
"""Limit of a communication until the run is warm: data indices are built and kernels compiled, on some ranks first.
`train.timeout_seconds` holds from then on."""

SILENCE_SECONDS = 15.0
"""Before the ranks have met, those other than 0 keep a mistake to themselves for so long: rank 0 will say it."""

_PATIENCE_SECONDS = 5.0
"""A rank that lost a peer waits this long before it complains: the launcher may be about to end it, and the peer's own
message is the one that helps."""

log = logging.getLogger("megalite")


@dataclass(frozen=True)
class World:
    """Place of this process among those of the job, from torchrun's or SLURM's environment; alone without either."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> World:
        for rank, size, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ):
            if rank in environment and size in environment:
                world = World(int(environment[rank]), int(environment[size]), int(environment.get(local, "0")))
                if world.size > 1 and "MASTER_ADDR" not in environment:
                    if rank == "SLURM_PROCID":
                        return World()  # an interactive shell inside an allocation, not a launched task
                    raise UserError(f"MASTER_ADDR is not set for {world.size} ranks; start them with torchrun or SLURM")
                return world
        return World()


def follow_launcher() -> None:
    """On Linux: be asked to stop (SIGTERM) when the launcher dies, so that killing it leaves no orphans behind."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGTERM))


def choose_device(config: Config, world: World) -> torch.device:
    """The GPU of this local rank, or the CPU: `run.device`."""
    if config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise UserError(
            f"local rank {world.local_rank} has no GPU: this machine has {count}; start {count} processes on it, "
            "or set run.device to cpu"
        )
    torch.cuda.set_device(world.local_rank)
    stay_near(pci_address(world.local_rank))
    return torch.device("cuda", world.local_rank)


def connect(config: Config, world: World, device: torch.device) -> Mesh:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and build the mesh; with start-up's patience for now."""
    timeout = timedelta(seconds=max(STARTUP_TIMEOUT_SECONDS, config.train.timeout_seconds))
    if world.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = open_store(world.rank, world.size, timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    parallel = config.parallel
    mesh = Mesh(
        pp=parallel.pipeline,
        dp=config.data_parallel(world.size),
        cp=parallel.context,
        tp=parallel.tensor,
        rank=world.rank,
        device=device,
        make_group=functools.partial(create_group, timeout=timeout),
    )
    for axes in (("tp",), ("pp",), ("dp", "cp")):  # every rank makes its groups here, in one order
        mesh.group(*axes)
    _ = mesh.world
    return mesh


class StopRequest:
    """Remembers SIGTERM and SIGUSR1; the loop asks at step boundaries, when all ranks can agree."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number).name

        previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def open_log(config: Config, world: World) -> None:
    """Everything goes to this rank's file under run.dir/log; rank 0's notices and all warnings to the terminal too."""
    folder = Path(config.run.dir) / "log"
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank_{world.rank:05d}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
    prefix = "" if world.size == 1 else f"[rank {world.rank}] "
    terminal.setFormatter(logging.Formatter(f"{prefix if world.rank else ''}%(message)s"))
    log.handlers[:] = [file, terminal]
    logging.raiseExceptions = False  # a full disk must not fill the terminal with the log's own traces
    log.setLevel(logging.INFO)
    log.propagate = False


def leave(code: int, world: World) -> None:
    """End this process at once with `code`, leaving it where the launcher looks for it. Does not return."""
    folder = os.environ.get(EXIT_CODES_ENVIRONMENT)
    if folder:
        with contextlib.suppress(OSError):
            (Path(folder) / f"rank_{world.rank:05d}").write_text(f"{code}\n")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that still wait for a dead peer would keep an ordinary exit from ending.
    os._exit(code)


def explain_fault(error: BaseException, world: World, stop: StopRequest) -> None:
    """One line on the terminal, the trace in the rank's log. A lost peer's own complaint goes first."""
    trace = "".join(traceback.format_exception(error))
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(logging.LogRecord("megalite", logging.ERROR, "", 0, trace, None, None))
    if world.size > 1 and isinstance(error, RuntimeError):
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and stop.signal is None:
            time.sleep(0.1)
        if stop.signal is not None:
            return
    summary = str(error).strip().splitlines()[0] if str(error).strip() else ""
    where = f"log/rank_{world.rank:05d}.log"
    print(
        f"error: rank {world.rank}: {type(error).__name__}: {summary} (trace in {where})", file=sys.stderr, flush=True
    )
