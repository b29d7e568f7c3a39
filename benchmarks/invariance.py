"""What it costs that bits do not depend on the number of ranks, or on the batch (docs/invariance.md).

    python benchmarks/invariance.py

CPU seconds of a training step under `train.invariant`, and of a training step and of generation under
`train.batch_invariant`, as multiples of the same without it: the least of `--repeats`, taken in turn in one process.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.cli import program
from megalite.config import Config, build_config
from megalite.data.batch import Batch
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import CPU, Mesh
from megalite.train.invariant_trainer import build_trainer
from megalite.train.trainer import Trainer

MODEL = {"layers": 4, "hidden_size": 512, "ffn_hidden_size": 1408, "heads": 8, "kv_heads": 8, "vocab_size": 8192}
PARTS = (1, 2, 4, 8)
SAMPLES = 8


@dataclass(frozen=True)
class Options:
    """The cost of bits that do not depend on the ranks, or on the batch."""

    seq_length: int = 256
    new_tokens: int = 64
    rows: int = 64
    """Answers that are written together."""
    repeats: int = 5


def trainer_of(options: Options, precision: str, **train: Any) -> Trainer:
    config = build_config(
        {
            "model": {**MODEL, "max_positions": 2 * options.seq_length},
            "train": {
                "seq_length": options.seq_length,
                "micro_batch_size": 1,
                "global_batch_size": SAMPLES,
                "precision": precision,
                **train,
            },
        }
    )
    trainer = build_trainer(config, Mesh(), select_kernels({}, CPU))
    trainer.initialise()
    return trainer


def step_of(trainer: Trainer) -> Callable[[], object]:
    config: Config = trainer.config
    tokens = torch.randint(config.model.vocab_size, (SAMPLES, config.train.seq_length + 1))
    batches = [Batch(row[None, :-1].contiguous(), row[None, 1:].contiguous()) for row in tokens]
    return lambda: trainer.step(batches, 1e-4)


def writing_of(trainer: Trainer, options: Options) -> Callable[[], object]:
    config = trainer.config
    prompts = [
        [random.randrange(config.model.vocab_size) for _ in range(random.randint(16, 64))] for _ in range(options.rows)
    ]

    def write() -> None:
        with trainer.generating() as stages:
            generator = Generator(
                stages, trainer.owners, trainer.mesh, config.model, trainer_logprobs=config.train.batch_invariant
            )
            generator.run(prompts, Sampling(1.0, seed=1), Limits(options.new_tokens), sampler_logprobs=True)

    return write


def compare(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of each as a multiple of the first's."""
    least = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                least[name] = min(least[name], time.process_time() - began)
    base = next(iter(least.values()))
    return {name: round(seconds / base, 2) for name, seconds in least.items()}


@program
def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    for precision in ("fp32", "bf16"):
        steps = {"step": step_of(trainer_of(options, precision))}
        steps |= {f"invariant = {parts}": step_of(trainer_of(options, precision, invariant=parts)) for parts in PARTS}
        found[f"{precision} ranks"] = compare(steps, options.repeats)
        print(precision, found[f"{precision} ranks"], flush=True)
        plain, exact = (trainer_of(options, precision, batch_invariant=batch) for batch in (False, True))
        found[f"{precision} batch, training"] = compare(
            {"step": step_of(plain), "batch_invariant": step_of(exact)}, options.repeats
        )
        found[f"{precision} batch, generation"] = compare(
            {"generation": writing_of(plain, options), "batch_invariant": writing_of(exact, options)}, options.repeats
        )
        print(precision, found[f"{precision} batch, training"], found[f"{precision} batch, generation"], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
