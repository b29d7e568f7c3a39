"""Runs one row of `benchmarks/train.py` in this process: megalite, a yardstick of benchmarks/plain.py, or products."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from plain import BareLlama, PlainLlama, fastest_attention
from train_job import Job, Meter, finish, job_from_arguments, micro_batches, rank, start_process

from megalite.config import Config, build_config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.kernels.attention.choice import choose_attention
from megalite.mesh import Mesh
from megalite.model.sharded import DTYPES
from megalite.observe.lines import read_lines
from megalite.observe.timeline import Recorder
from megalite.placement import PlacedParameter
from megalite.train.attention_calls import attention_calls
from megalite.train.trainer import Trainer

OBSERVED = 3
"""Steps under the recorder after the measured ones; of the third it keeps every operation."""


def configuration(job: Job) -> Config:
    parallel: dict[str, Any] = {axis: size for axis, size in job.layout.items() if axis != "data"}
    parallel |= {"schedule": job.schedule, "context_mode": job.context_mode}
    if job.tensor > 1:
        parallel["sequence"] = job.sequence
    train = {
        "seq_length": job.preset.seq_length,
        "micro_batch_size": job.micro,
        "global_batch_size": job.preset.global_batch,
        "precision": job.precision,
        "recompute": job.recompute,
        "fp8": job.fp8,
        "cuda_graph": job.cuda_graph,
    }
    return build_config({"model": job.shape, "parallel": parallel, "train": train, "kernels": {"default": job.kernels}})


def run_megalite(job: Job, device: torch.device) -> None:
    config = configuration(job)
    parallel = config.parallel
    mesh = Mesh(
        pp=job.pipeline,
        dp=job.data,
        ep=parallel.expert,
        cp=parallel.context,
        tp=job.tensor,
        rank=rank(),
        device=device,
    )
    kernels = select_kernels({"default": job.kernels}, device)
    trainer = Trainer(config, mesh, kernels)
    draw_weights(trainer)
    attention = choose_attention(kernels, attention_calls(config), mesh)
    batches = [Batch(tokens, labels) for tokens, labels in micro_batches(job, mesh.samples_index)]

    def step() -> float:
        return trainer.step([batch.to(device) for batch in batches], 1e-3).loss

    meter = Meter(job)
    meter.run(step)
    trainer.graph = None  # a replay has no operations that could be observed
    finish(meter, **observe(trainer, mesh, batches), kernels=dict(kernels.choices), attention=attention)


@torch.no_grad()
def draw_weights(trainer: Trainer) -> None:
    """Weights of the trained kind, drawn by the device: those of a seed take minutes for billions, and the speed of a
    step does not depend on them."""

    def draw(parameter: PlacedParameter) -> None:
        placement = parameter.placement
        parameter.zero_()
        for box in placement.boxes:
            if placement.init == "normal":
                box.view(parameter).normal_(std=placement.std)
            elif placement.init == "ones":
                box.view(parameter).fill_(1.0)

    for buckets in trainer.buckets.values():
        buckets.fill(draw)
    trainer.optimizer.restart()


def observe(trainer: Trainer, mesh: Mesh, batches: list[Batch]) -> dict[str, Any]:
    """A few more steps under the recorder: seconds of every phase, and the operations of one step."""
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(mesh, folder)
        trainer.observe = recorder.observe
        for number in range(1, OBSERVED + 2):
            with recorder.step(number):
                with recorder.phase("data"):
                    local = [batch.to(mesh.device) for batch in batches]
                trainer.step(local, 1e-3)
        recorder.close()
        rows = [row for path in Path(folder).rglob("*.jsonl") for row in read_lines(path)]
    timed = [row for row in rows if "seconds" in row]
    steps = sum(row["steps"] for row in timed)
    phases = {name for row in timed for name in row["seconds"]}
    seconds = {name: sum(row["seconds"].get(name, 0.0) * row["steps"] for row in timed) / steps for name in phases}
    sampled = [row for row in rows if "operations" in row][-1]
    return {"phases": seconds, "operations": sampled["operations"], "waits": sampled["waits"]}


def run_yardstick(job: Job, device: torch.device) -> None:
    """Weights and optimizer in fp32; bf16 is autocast, as one would write it."""
    config = configuration(job)
    kernels = select_kernels({"default": job.kernels}, device)
    model = PlainLlama(config.model) if job.runner == "plain" else BareLlama(config.model, kernels)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model, dynamic=False) if job.compile else model
    batches = micro_batches(job, 0)

    def precision() -> AbstractContextManager[Any]:
        narrow = job.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext()

    def step() -> float:
        total = 0.0
        for tokens, labels in batches:
            with precision(), fastest_attention(device):
                loss = forward(tokens.to(device), labels.to(device)) / len(batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    meter = Meter(job)
    meter.run(step)
    finish(meter)


def measure_products(job: Job, device: torch.device) -> None:
    """TFLOP/s of products in the model's shapes, best of several: what a step could reach at most."""
    shape, flops, seconds = job.shape, 0.0, 0.0
    hidden, ffn = shape["hidden_size"], shape["ffn_hidden_size"]
    rows = min(job.micro * job.preset.seq_length, 8192)
    for inner, outer in ((hidden, 2 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)):
        a, b = (torch.randn(size, device=device).to(DTYPES[job.precision]) for size in ((rows, inner), (inner, outer)))
        out = torch.empty(rows, outer, device=device, dtype=a.dtype)
        best = float("inf")
        for _ in range(10):
            begun = time.perf_counter()
            torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
        flops, seconds = flops + 2.0 * rows * inner * outer, seconds + best
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    print(json.dumps({"tflops": flops / seconds / 1e12, "device": name}))


RUNNERS: dict[str, Callable[[Job, torch.device], None]] = {
    "megalite": run_megalite,
    "plain": run_yardstick,
    "bare": run_yardstick,
    "products": measure_products,
}

if __name__ == "__main__":
    own = job_from_arguments()
    RUNNERS[own.runner](own, start_process(own))
