"""How right the planner is: published numbers and memory measured here, beside what it predicts.

    python benchmarks/planner/measure.py [--measure true] [--output benchmarks/results/planner.json]

Parameters, FLOPs, memory and speed of other programs come from `benchmarks.planner.published`, with their sources. The
memory of real training on CPU processes is measured: the most resident memory of a rank during two steps, less what
it had after start-up (imports, process group, a few steps of a tiny model in the same layout). The C library is told
to give freed tensors back at once, so that resident memory is that of the tensors.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.planner.published import (
    Point,
    flops_points,
    memory_points,
    order_agreement,
    parameter_points,
    speed_points,
)
from megalite.config import build_config
from megalite.planning import DEVICES, Job
from megalite.planning.memory import worst_rank

MODEL: dict[str, Any] = {
    "layers": 6,
    "hidden_size": 384,
    "ffn_hidden_size": 1024,
    "heads": 6,
    "kv_heads": 2,
    "vocab_size": 8192,
    "max_positions": 512,
}
"""16 million parameters."""

SPARSE = {"experts": 16, "experts_per_token": 2, "expert_ffn_hidden_size": 512}
"""What makes of it a model of 60 million parameters, most of them experts'."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

SECONDS = 240
"""A worker that takes longer than this is ended."""


def layout(
    processes: int,
    micro: int = 2,
    batch: int = 4,
    model: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    **fields: Any,
) -> tuple[int, dict[str, Any]]:
    """(processes, recipe) of one measurement; `fields` are those of [parallel], and precision and recompute; `model`
    is added to MODEL, `adapter` is the section of that name."""
    train = {"seq_length": 512, "micro_batch_size": micro, "global_batch_size": batch, "precision": "fp32"}
    train |= {name: fields.pop(name) for name in ("precision", "recompute") if name in fields}
    return processes, {
        "model": MODEL | (model or {}),
        "parallel": fields,
        "train": train,
        "adapter": adapter or {},
    }


LORA = {"kind": "lora", "rank": 16}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": layout(1, 4),
    "1 process, bf16": layout(1, 4, precision="bf16"),
    "1 process, selective": layout(1, 4, recompute="selective"),
    "1 process, full": layout(1, 4, recompute="full"),
    "tensor 2": layout(2, 4, tensor=2),
    "tensor 2, bf16": layout(2, 4, tensor=2, precision="bf16"),
    "pipeline 2": layout(2, pipeline=2),
    "pipeline 2, bf16": layout(2, pipeline=2, precision="bf16"),
    "pipeline 2, interleaved": layout(2, pipeline=2, schedule="interleaved", virtual_stages=3),
    "pipeline 2, zb_h1": layout(2, pipeline=2, schedule="zb_h1"),
    "data 2, ZeRO-0": layout(2, zero=0),
    "data 2, ZeRO-1": layout(2, zero=1),
    "data 2, ZeRO-1, bf16": layout(2, zero=1, precision="bf16"),
    "data 2, ZeRO-2": layout(2, zero=2),
    "data 2, ZeRO-3": layout(2, zero=3),
    "LoRA": layout(1, 4, adapter=LORA),
    "LoRA, bf16": layout(1, 4, adapter=LORA, precision="bf16"),
    "LoRA, selective": layout(1, 4, adapter=LORA, recompute="selective"),
    "LoRA, data 2, ZeRO-3": layout(2, adapter=LORA, zero=3),
    "LoRA, tensor 2": layout(2, 4, adapter=LORA, tensor=2),
    "context 2, gather": layout(2, 4, context=2, context_mode="gather"),
    "context 2, ring": layout(2, 4, context=2, context_mode="ring"),
    "context 2, ulysses": layout(2, 4, context=2, context_mode="ulysses"),
    "experts, 1 process": layout(1, 4, model=SPARSE),
    "experts, data 2": layout(2, model=SPARSE),
    "experts, expert 2": layout(2, model=SPARSE, expert=2),
    "experts, expert 2, full": layout(2, model=SPARSE, expert=2, recompute="full"),
}


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _train(recipe: dict[str, Any], rank: int, size: int, steps: int) -> None:
    """A few steps of real training on random tokens."""
    import torch

    from megalite.data.batch import Batch
    from megalite.kernels import select_kernels
    from megalite.mesh import Mesh
    from megalite.train.trainer import Trainer

    config = build_config(recipe)
    parallel, train = config.parallel, config.train
    data = config.data_parallel(size) // parallel.expert
    mesh = Mesh(pp=parallel.pipeline, dp=data, ep=parallel.expert, cp=parallel.context, tp=parallel.tensor, rank=rank)
    trainer = Trainer(config, mesh, select_kernels({}, torch.device("cpu")))
    for buckets in trainer.buckets.values():
        buckets.fill(functools.partial(torch.nn.init.normal_, std=0.02))
    trainer.optimizer.restart()
    draw = torch.Generator().manual_seed(mesh.samples_index)

    def batch() -> Batch:
        shape = (train.micro_batch_size, train.seq_length + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=draw)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    for _ in range(steps):
        trainer.step([batch() for _ in range(config.micro_batches(size))], 1e-3)


def worker(recipe: dict[str, Any], rank: int, size: int, store: str) -> None:
    """One rank of a measurement; prints its bytes."""
    import gc

    import torch

    torch.set_num_threads(1)
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    tiny = copy.deepcopy(recipe)
    tiny["model"] |= {"hidden_size": 48, "ffn_hidden_size": 64, "vocab_size": 64}
    tiny["train"] |= {"seq_length": 32}
    _train(tiny, rank, size, 2)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    _train(recipe, rank, size, 2)
    print(_status("VmHWM") - before, flush=True)
    os._exit(0)


def measure(name: str) -> Point:
    """MiB of the fullest rank of one of `LAYOUTS`, measured and predicted."""
    size, recipe = LAYOUTS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", json.dumps(recipe), str(size), f"{folder}/store"]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | GIVE_BACK)
            for rank in range(size)
        ]
        try:
            outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    measured = max(int(output.split()[-1]) for output in outputs)
    predicted = worst_rank(Job.of(build_config(recipe), size, DEVICES["cpu"])).total
    return Point(name, "MiB", measured / 2**20, predicted / 2**20)


def show(title: str, points: list[Point]) -> None:
    """A table on the terminal."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="")
    for column in ("point", "published", "predicted", "unit", "error", "note"):
        table.add_column(column, justify="left" if column in ("point", "unit", "note") else "right", no_wrap=True)
    for point in points:
        numbers = (f"{point.published:.5g}", f"{point.predicted:.5g}", point.unit, f"{point.error:+.1%}", point.note)
        table.add_row(point.name, *numbers)
    Console(width=150).print(table)


def agreements(points: list[Point]) -> dict[str, tuple[int, int]]:
    """Group -> (pairs in the right order, pairs)."""
    names = dict.fromkeys(point.group for point in points if point.group)
    return {name: order_agreement([point for point in points if point.group == name]) for name in names}


@dataclass
class Arguments:
    """Compare the planner with published numbers, and with memory measured on CPU processes."""

    measure: bool = True
    """Train small models to measure memory; some minutes."""
    output: Path | None = None
    """Write everything here as JSON."""


def main(arguments: Arguments) -> None:
    tables = {
        "Parameters": parameter_points(),
        "FLOPs": flops_points(),
        "Memory, published": memory_points(),
        "Speed, published": speed_points(),
    }
    if arguments.measure:
        tables["Memory, measured on CPU processes"] = [measure(name) for name in LAYOUTS]
    for title, points in tables.items():
        show(title, points)
    order = agreements(tables["Speed, published"])
    for name, (right, pairs) in order.items():
        print(f"order, {name}: {right} of {pairs} pairs")
    if arguments.output is not None:
        rows = {title: [vars(point) | {"error": point.error} for point in points] for title, points in tables.items()}
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        arguments.output.write_text(json.dumps({"machine": machine, "tables": rows, "order": order}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]), int(sys.argv[5]), int(sys.argv[3]), sys.argv[4])
    main(tyro.cli(Arguments))
