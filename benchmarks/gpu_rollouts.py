"""Speed of the trainer's own generation, as PPO and GRPO use it: `gpu_session.sh`'s section `rollouts`.

    python benchmarks/gpu_rollouts.py --out DIR [--device cuda|cpu]

A 1.24 B model (10 M on a CPU) with random weights in bf16 answers 1, 16 and 64 prompts, on a GPU once more with the
loop of tokens as a CUDA graph. DIR/rollouts.json is written anew after every row: new tokens per second, seconds of one
token of all rows, and their share of the bound that reading every weight once for each token sets, at the bandwidth
that a copy reached in the same process. A row that failed is a row with an error; exits 1 if there was one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from clock import Clock, copy_rate
from train_job import PRESETS, Job
from train_worker import configuration, draw_weights

from megalite.cuda_graph import CudaRecorder
from megalite.files import write_atomically
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer

ROWS = (1, 16, 64)
MODELS = {"cuda": ("1.24b", 512, 128), "cpu": ("10m", 32, 8)}
"""By device: model, tokens of a prompt, new tokens."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def row(generator: Generator, rows: int, prompt: int, new: int, vocabulary: int, device: torch.device) -> list[float]:
    """Seconds of three runs after one that warms up, all of the same shape."""
    numbers = torch.Generator().manual_seed(rows)
    prompts = torch.randint(vocabulary, (rows, prompt), generator=numbers).tolist()
    seconds = []
    for _ in range(4):
        wait(device)
        begun = time.perf_counter()
        generator.run(prompts, Sampling(temperature=1.0, seed=1), Limits(max_new_tokens=new))
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    name, prompt, new = MODELS[device.type]
    job = Job(runner="megalite", model=name, layers=PRESETS[name].model["layers"], precision="bf16", device=device.type)
    config = configuration(job)
    trainer = Trainer(config, Mesh(device=device), select_kernels({"default": "auto"}, device))
    draw_weights(trainer)
    weights = sum(parameter.nbytes for stage in trainer.stages.values() for parameter in stage.parameters())
    bandwidth = copy_rate(device, Clock(device))
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "command": f"benchmarks/gpu_rollouts.py --device {device.type}",
        "model": name,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "weight_bytes": weights,
        "copy_bytes_per_second": bandwidth,
        "rows": {},
    }
    graphs = (None, CudaRecorder(device)) if device.type == "cuda" else (None,)
    with trainer.generating() as stages:
        for rows, graph in itertools.product(ROWS, graphs):
            label = f"{rows}" if graph is None else f"{rows} graph"
            try:
                generator = Generator(stages, trainer.owners, trainer.mesh, config.model, graph=graph)
                seconds = row(generator, rows, prompt, new, config.model.vocab_size, device)
                token = statistics.median(seconds) / new
                measured: dict[str, Any] = {
                    "seconds": seconds,
                    "tokens_per_second": rows / token,
                    "token_seconds": token,
                }
                measured["share_of_bound"] = weights / bandwidth / token
            except Exception as error:
                measured = {"error": repr(error)}
            document["rows"][label] = measured
            write_atomically(options.out / "rollouts.json", json.dumps(document, indent=1) + "\n")
            print(f"{label} rows: {measured}", flush=True)
    return int(any("error" in measured for measured in document["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
