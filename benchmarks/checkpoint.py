"""Saving and loading of checkpoints beside raw files, `torch.save` per rank and plain DCP, in one run.

    python benchmarks/checkpoint.py [--processes 2] [--hidden-size 512] [--repeats 5] [--folder DIR]

A small Llama under ZeRO-1 (data parallel over the processes) is saved and loaded; the others move exactly the bytes
that megalite's file of the same rank holds. Every writer syncs its file before it is done. Nothing is in the page cache
when a method begins: what one left there would slow the next. Earlier files of all methods are deleted outside of the
measured time. The methods take turns in an order that rotates, and the numbers are medians, with the quartiles: seconds
until the slowest rank is done, and throughput as a fraction of the raw files' in the same turn. Loading includes the
all-gather of the weights, which the others do not have; `megalite, reading` is the part up to there.
"""

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro

from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.restore import read_state
from megalite.checkpoint.source import CheckpointReader
from megalite.config import build_config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer

SEQUENCE, VOCABULARY = 128, 8192


@dataclass(frozen=True)
class Options:
    """Saving and loading of checkpoints."""

    processes: int = 2
    """Ranks, all data parallel."""
    hidden_size: int = 512
    """Width of the model; 8 layers."""
    repeats: int = 5
    """Turns; medians are shown."""
    folder: Path | None = None
    """Where to write, by default a temporary directory: give one on the disk that is to be measured."""


def make_trainer(options: Options, rank: int, *, background: bool) -> Trainer:
    width = options.hidden_size
    model = {"layers": 8, "hidden_size": width, "heads": 8, "vocab_size": VOCABULARY, "max_positions": SEQUENCE}
    config = build_config(
        {
            "model": model,
            "train": {
                "seq_length": SEQUENCE,
                "micro_batch_size": 4,
                "global_batch_size": 4 * options.processes,
                "precision": "fp32",
            },
            "checkpoint": {"keep": 0, "async_save": background},
        }
    )
    mesh = Mesh(dp=options.processes, rank=rank)
    trainer = Trainer(config, mesh, select_kernels({}, mesh.device))
    trainer.initialise()
    return trainer


def step_seconds(trainer: Trainer) -> float:
    tokens = torch.randint(0, VOCABULARY, (4, SEQUENCE + 1))
    began = time.perf_counter()
    trainer.step([Batch(tokens[:, :-1], tokens[:, 1:])], 1e-4)
    return time.perf_counter() - began


def slowest(work: Callable[[], object]) -> float:
    """Seconds until the last rank has finished `work`, begun together."""
    dist.barrier()
    began = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def drop_from_cache(folder: Path) -> None:
    dist.barrier()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    dist.barrier()


class Methods:
    """The ways of one rank to write and to read as many bytes as megalite's file of this rank holds."""

    def __init__(self, options: Options, rank: int, folder: Path) -> None:
        self.trainer, self.folder, self.rank = make_trainer(options, rank, background=False), folder, rank
        self.manager = CheckpointManager(folder / "megalite", self.trainer.config, self.trainer.mesh)
        self.manager.save(self.trainer, {"step": 0})
        self.bytes = self._own_file(0).stat().st_size
        self.state = {
            f"{rank}.{number}.{kind}": values
            for number, segment in enumerate(self.trainer.optimizer.segments)
            for kind, values in {"weight": segment.master.detach(), **segment.state}.items()
        }
        self.flat = torch.cat([values.view(torch.uint8) for values in self.state.values()])[: self.bytes].numpy()

    def _own_file(self, step: int) -> Path:
        return self.manager.folder / f"step_{step:08d}" / f"rank_{self.rank:05d}.safetensors"

    def _fresh(self, name: str) -> Path:
        path = self.folder / name
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        dist.barrier()
        return path

    def writers(self, turn: int) -> dict[str, Callable[[], object]]:
        raw, pickled, plain, _ = (self._fresh(name) for name in ("raw", "torch", "dcp", "megalite/checkpoints"))

        def write_raw() -> None:
            with open(raw / str(self.rank), "wb", buffering=0) as file:
                view = self.flat.data
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())

        def write_torch() -> None:
            with open(pickled / str(self.rank), "wb") as file:
                torch.save(self.state, file)
                file.flush()
                os.fsync(file.fileno())

        return {
            "raw files": write_raw,
            "megalite": lambda: self.manager.save(self.trainer, {"step": turn}),
            "torch.save": write_torch,
            "plain DCP": lambda: dcp.save(self.state, storage_writer=dcp.FileSystemWriter(plain)),
        }

    def readers(self) -> dict[str, Callable[[], object]]:
        def read_raw() -> None:
            with open(self.folder / "raw" / str(self.rank), "rb", buffering=0) as file:
                view = self.flat.data
                while view:
                    view = view[file.readinto(view) :]

        def read() -> None:
            with CheckpointReader(self.folder / "megalite") as reader:
                read_state(self.trainer, reader, optimizer=True)

        return {
            "raw files": read_raw,
            "megalite": lambda: self.manager.load_latest(self.trainer),
            "megalite, reading": read,
            "torch.save": lambda: torch.load(self.folder / "torch" / str(self.rank)),
            "plain DCP": lambda: dcp.load(self.state, storage_reader=dcp.FileSystemReader(self.folder / "dcp")),
        }


def measure(rank: int, options: Options, folder: Path, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    methods = Methods(options, rank, folder)
    writing: dict[str, list[float]] = {}
    reading: dict[str, list[float]] = {}
    for turn in range(1, options.repeats + 1):
        for seconds, works in ((writing, methods.writers(turn)), (reading, methods.readers())):
            names = list(works)
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                drop_from_cache(folder)
                seconds.setdefault(name, []).append(slowest(works[name]))
    methods.manager.close()
    stalls, steps = behind(options, rank, folder)
    if rank == 0:
        gigabytes = methods.bytes * options.processes / 1e9
        report(options, gigabytes, {"save": writing, "load": reading}, stalls, steps)
    dist.destroy_process_group()


def behind(options: Options, rank: int, folder: Path) -> tuple[list[float], list[float]]:
    """Stalls of saves behind the training (the first, which allocates, is left out), and seconds of a step without."""
    trainer = make_trainer(options, rank, background=True)
    steps = [step_seconds(trainer) for _ in range(2)][1:]
    stalls = []
    with CheckpointManager(folder / "behind", trainer.config, trainer.mesh) as manager:
        for turn in range(1, options.repeats + 2):
            dist.barrier()
            stalls.append(manager.save(trainer, {"step": turn}))
            manager.wait()
    return stalls[1:], steps


def report(
    options: Options,
    gigabytes: float,
    seconds: dict[str, dict[str, list[float]]],
    stalls: list[float],
    steps: list[float],
) -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{options.processes} processes, {gigabytes:.3f} GB in all, medians of {options.repeats} turns")
    ratios = {}
    for direction, methods in seconds.items():
        for name, times in methods.items():
            shares = [raw / own for raw, own in zip(methods["raw files"], times)]
            low, share, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
            median = statistics.median(times)
            ratios[f"{direction} {name}"] = [round(number, 3) for number in (share, low, high)]
            print(
                f"{direction}  {name:17}  {median:7.3f} s  {gigabytes / median:6.2f} GB/s  "
                f"{share:5.2f} of raw ({low:.2f} to {high:.2f})"
            )
    stall, step = statistics.median(stalls), statistics.median(steps)
    save = statistics.median(seconds["save"]["megalite"])
    of_both = f"{stall / save:.2f} of a save, {stall / step:.2f} of a step"
    print(f"stall of a save behind the training: {stall:.3f} s = {of_both}")
    own = {"stall of save": round(stall / save, 3), "stall of step": round(stall / step, 3)}
    print(json.dumps({"share of raw: median, quartiles": ratios, **own}))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = f"{folder}/store"
        arguments = [(rank, options, Path(folder), store) for rank in range(options.processes)]
        ranks = [context.Process(target=measure, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
