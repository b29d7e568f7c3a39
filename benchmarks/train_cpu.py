"""Training speed on CPU cores: megalite in one process and in TP2, PP2, DP2, beside plain PyTorch, in one run.

    python benchmarks/train_cpu.py [--rounds 3] [--steps 5] [--output benchmarks/results/train_cpu.json]

Every variant runs in fresh processes; the variants take turns, so that a busy machine slows all alike. CPU seconds per
step (summed over processes) are the figure that a busy machine disturbs least. Model FLOPs are 6 * matmul parameters +
12 * layers * heads * head_dim * sequence per token; the matmul rate is measured on the model's own shapes.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from megalite.config import Config, build_config
from megalite.data.batches import Batch
from megalite.train.flops import training_flops_per_token

MODEL = {
    "layers": 8,
    "hidden_size": 256,
    "ffn_hidden_size": 688,
    "heads": 8,
    "kv_heads": 4,
    "vocab_size": 8192,
    "max_positions": 512,
}
SEQUENCE, BATCH = 512, 8
VARIANTS: dict[str, dict[str, int]] = {
    "megalite 1 process": {},
    "plain PyTorch": {},
    "bare loop": {},
    "megalite TP2": {"tensor": 2},
    "megalite PP2": {"pipeline": 2},
    "megalite DP2": {"data": 2},
}


def make_config(layout: dict[str, int], precision: str) -> Config:
    micro = BATCH // layout.get("data", 1) if layout.get("pipeline", 1) == 1 else 2
    parallel = {axis: size for axis, size in layout.items() if axis != "data"}
    train = {"seq_length": SEQUENCE, "micro_batch_size": micro, "global_batch_size": BATCH, "precision": precision}
    return build_config({"model": MODEL, "parallel": parallel, "train": train})


def step_of(variant: str, precision: str, rank: int, size: int) -> Any:
    """A function that makes one training step of the variant."""
    from megalite.kernels import select_kernels
    from megalite.mesh import Mesh
    from megalite.train.trainer import Trainer

    config = make_config(VARIANTS[variant], precision)
    data = torch.randint(0, MODEL["vocab_size"], (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    tokens, labels = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    kernels = select_kernels({}, torch.device("cpu"))
    if variant.startswith("megalite"):
        mesh = Mesh(pp=config.parallel.pipeline, tp=config.parallel.tensor, dp=config.data_parallel(size), rank=rank)
        trainer = Trainer(config, mesh, kernels)
        trainer.initialise()
        micro, dp = config.train.micro_batch_size, mesh.dp
        batches = [
            Batch(tokens[first : first + micro].contiguous(), labels[first : first + micro].contiguous())
            for first in range(mesh.index("dp") * micro, BATCH, micro * dp)
        ]
        return lambda: trainer.step(batches, 1e-3)
    import plain

    model = plain.PlainLlama(config.model) if variant.startswith("plain") else plain.BareLlama(config.model, kernels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        model(tokens, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def worker(variant: str, precision: str, rank: int, size: int, store: str, steps: int) -> None:
    """One process of a variant; prints what it measured as JSON."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    step = step_of(variant, precision, rank, size)
    for _ in range(2):
        step()
    walls, cpus = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"wall": statistics.median(walls), "cpu": statistics.median(cpus), "gib": peak}), flush=True)
    os._exit(0)


def measure(variant: str, precision: str, steps: int) -> dict[str, float]:
    size = 1
    for ranks in VARIANTS[variant].values():
        size *= ranks
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", variant, precision]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(size), f"{folder}/store", str(steps)], stdout=subprocess.PIPE, text=True
            )
            for rank in range(size)
        ]
        outputs = [process.communicate()[0] for process in processes]
    ranks = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        "wall": max(rank["wall"] for rank in ranks),
        "cpu": sum(rank["cpu"] for rank in ranks),
        "gib": sum(rank["gib"] for rank in ranks),
    }


def matmul_rate() -> float:
    """FLOP/s of fp32 products on the model's shapes with all cores: the best of several, weighted by their FLOPs."""
    rows, hidden, ffn = BATCH * SEQUENCE, MODEL["hidden_size"], MODEL["ffn_hidden_size"]
    flops = seconds = 0.0
    for inner, outer in ((hidden, 2 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, outer), torch.empty(rows, outer)
        times = []
        for _ in range(10):
            begun = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - begun)
        flops, seconds = flops + 2.0 * rows * inner * outer, seconds + min(times)
    return flops / seconds


@dataclass
class Arguments:
    """Measure training speed on this machine's CPU cores."""

    rounds: int = 3
    """How often the variants take turns."""
    steps: int = 5
    """Measured steps of a variant in each turn, after two for warming up."""
    precision: str = "fp32"
    """fp32, or bf16 (then the plain variants stay fp32 and are only for orientation)."""
    output: Path | None = None
    """Write the results here as JSON."""


def main(arguments: Arguments) -> None:
    rate = matmul_rate()
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            rounds[variant].append(measure(variant, arguments.precision, arguments.steps))
    tokens = BATCH * SEQUENCE
    flops = training_flops_per_token(make_config({}, "fp32").model, SEQUENCE) * tokens
    rows = {}
    print(f"matmul rate {rate / 1e9:.0f} GFLOP/s; model {flops / 1e9:.0f} GFLOP a step of {tokens} tokens")
    print(
        f"{'variant':20} {'tokens/s':>9} {'CPU s/step':>11} {'of matmul':>10} {'GiB':>6}  CPU against plain (low, high)"
    )
    for variant, results in rounds.items():
        wall, cpu = (statistics.median(result[key] for result in results) for key in ("wall", "cpu"))
        ratios = [other["cpu"] / own["cpu"] for own, other in zip(results, rounds["plain PyTorch"])]
        overhead = [own["cpu"] / other["cpu"] - 1 for own, other in zip(results, rounds["bare loop"])]
        rows[variant] = {
            "tokens_per_second": tokens / wall,
            "cpu_seconds_per_step": cpu,
            "fraction_of_matmul_rate": flops / wall / rate,
            "peak_gib": statistics.median(result["gib"] for result in results),
            "speed_against_plain": [statistics.median(ratios), min(ratios), max(ratios)],
            "cpu_overhead_over_bare": [statistics.median(overhead), min(overhead), max(overhead)],
        }
        row = rows[variant]
        print(
            f"{variant:20} {row['tokens_per_second']:9.0f} {cpu:11.3f} {row['fraction_of_matmul_rate']:10.1%} "
            f"{row['peak_gib']:6.2f}  {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        )
    median, low, high = rows["megalite 1 process"]["cpu_overhead_over_bare"]
    print(f"overhead of megalite over the bare loop: {median:+.1%} ({low:+.1%}, {high:+.1%}) CPU seconds")
    if arguments.output is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        about = {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}
        about["command"] = f"python benchmarks/train_cpu.py --rounds {arguments.rounds} --steps {arguments.steps}"
        result = {**about, "precision": arguments.precision, "matmul_gflops": rate / 1e9, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, precision, *numbers = sys.argv[2:]
        worker(name, precision, int(numbers[0]), int(numbers[1]), numbers[2], int(numbers[3]))
    main(tyro.cli(Arguments))
