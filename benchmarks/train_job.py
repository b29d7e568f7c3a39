"""What one row of `benchmarks/train.py` trains, and how its steps are measured: shared by megalite, yardsticks, peers.

A runner is a program that takes a `Job` as its one argument (JSON), trains, calls `Meter.tick` after every step, and
prints `Meter.result` as its last line. RANK and WORLD_SIZE say which of the row's processes it is.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

AXES = ("tensor", "pipeline", "context", "expert", "data")


@dataclass(frozen=True)
class Preset:
    """A model and the batch it is trained with: `model` as in the configuration's section, samples and tokens."""

    model: dict[str, Any]
    seq_length: int
    global_batch: int
    micro_batch: int
    pipeline_micro_batch: int
    gpu_layers: int = 0
    """Layers that every row, plain PyTorch in fp32 among them, fits on one GPU of 80 GB; 0: all."""


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, **rest: Any
) -> dict[str, Any]:
    shape = {"layers": layers, "hidden_size": hidden, "heads": heads, "kv_heads": kv_heads}
    return {**shape, "ffn_hidden_size": ffn, "vocab_size": vocabulary, **rest}


PRESETS = {
    "10m": Preset(_llama(8, 256, 8, 4, 688, 8192), 512, 8, 8, 2),
    "10m-experts": Preset(
        _llama(4, 256, 8, 4, 688, 8192, experts=8, experts_per_token=2, expert_ffn_hidden_size=344), 512, 8, 8, 2
    ),
    "124m": Preset(_llama(12, 768, 12, 12, 2048, 50304), 1024, 64, 32, 4),
    "1.24b": Preset(_llama(16, 2048, 32, 8, 8192, 128256, tie_embeddings=True), 4096, 8, 4, 1),
    "gpt2-1.5b": Preset(_llama(48, 1600, 25, 25, 4288, 50304), 1024, 32, 16, 4),
    "llama3-8b": Preset(_llama(32, 4096, 32, 8, 14336, 128256, rope_theta=500000.0), 8192, 2, 1, 1, 8),
}
"""Sizes of the rows. All are Llama-shaped; gpt2-1.5b has GPT-2's widths and the parameters of its feed-forward, and
10m-experts sparse layers in which a token computes as much as in a dense one."""


@dataclass(frozen=True)
class Job:
    """One row. `options` are those of its name, such as tensor=2 or compile=1; `layers` are those that are run."""

    runner: str
    model: str
    layers: int
    precision: str
    layout: dict[str, int] = field(default_factory=dict)
    kernels: str = "auto"
    recompute: str = "none"
    fp8: str = "none"
    cuda_graph: bool = False
    schedule: str = "1f1b"
    sequence: bool = True
    context_mode: str = "gather"
    compile: bool = False
    micro_batch: int = 0
    device: str = "cpu"
    warmup: int = 3
    steps: int = 5
    peer_path: str = ""
    store: str = ""

    @property
    def preset(self) -> Preset:
        return PRESETS[self.model]

    @property
    def shape(self) -> dict[str, Any]:
        """The configuration's model section, with the layers that are run."""
        return {**self.preset.model, "layers": self.layers, "max_positions": self.preset.seq_length}

    @property
    def ranks(self) -> int:
        ranks = 1
        for size in self.layout.values():
            ranks *= size
        return ranks

    @property
    def data(self) -> int:
        return self.layout.get("data", 1)

    @property
    def replicas(self) -> int:
        """Ranks that train on samples of their own."""
        return self.data * self.layout.get("expert", 1)

    @property
    def pipeline(self) -> int:
        return self.layout.get("pipeline", 1)

    @property
    def tensor(self) -> int:
        return self.layout.get("tensor", 1)

    @property
    def micro(self) -> int:
        """Samples of a micro-batch."""
        preset = self.preset
        chosen = self.micro_batch or (preset.pipeline_micro_batch if self.pipeline > 1 else preset.micro_batch)
        return min(chosen, preset.global_batch // self.replicas)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return self.preset.global_batch // (self.micro * self.replicas)

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.preset.global_batch * self.preset.seq_length

    def replace(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def job_from_arguments() -> Job:
    """The job of this process, which has one argument."""
    return Job(**json.loads(sys.argv[1]))


def rank() -> int:
    return int(os.environ["RANK"])


def start_process(job: Job) -> torch.device:
    """Device and process group of this rank; the device."""
    size = job.ranks
    torch.manual_seed(1)
    if job.device == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        backend = "gloo" if job.device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, init_method=f"file://{job.store}", rank=rank(), world_size=size)
    return device


def micro_batches(job: Job, replica: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) [micro, S] of data-parallel rank `replica`: the same random tokens for every runner."""
    shape = (job.preset.global_batch, job.preset.seq_length + 1)
    ids = torch.randint(0, job.shape["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    own = [ids[first : first + job.micro] for first in range(replica * job.micro, len(ids), job.micro * job.replicas)]
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in own]


class Meter:
    """Wall and CPU seconds of every step after the first `job.warmup`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.first_loss: float | None = None
        self._walls: list[float] = []
        self._cpus: list[float] = []
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        if self.job.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def tick(self, loss: float | None = None) -> None:
        """A step has ended. `loss`: its mean, for the check that all runners do the same work."""
        now = self._now()
        self._walls.append(now[0] - self._last[0])
        self._cpus.append(now[1] - self._last[1])
        if loss is not None and len(self._walls) == 1:
            self.first_loss = loss
        self._last = now

    @property
    def done(self) -> bool:
        return len(self._walls) >= self.job.warmup + self.job.steps

    def run(self, step: Any) -> None:
        """Call `step`, which returns its loss or None, until enough is measured."""
        self._last = self._now()
        while not self.done:
            self.tick(step())

    def result(self, **more: Any) -> str:
        """What this process measured, as a line of JSON."""
        kept = slice(self.job.warmup, None)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.job.device != "cpu":
            peak = torch.cuda.max_memory_allocated() / 2**30
        measured = {"walls": self._walls[kept], "cpus": self._cpus[kept], "gib": peak, "first_loss": self.first_loss}
        return json.dumps({**measured, **more})


def finish(meter: Meter, **more: Any) -> None:
    """Print the result and leave without the clean-up that would wait for other ranks."""
    print(meter.result(**more), flush=True)
    os._exit(0)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return {"median": ordered[0], "p20": ordered[0], "p80": ordered[0]}
    cuts = statistics.quantiles(ordered, n=5, method="inclusive")
    return {"median": statistics.median(ordered), "p20": cuts[0], "p80": cuts[-1]}
