"""Steps that Muon takes to the validation loss of AdamW, both with the best learning rate of a small grid.

    python benchmarks/muon.py --model small --steps 240 --seeds 1 2 3 --output benchmarks/results/muon.json
    python benchmarks/muon.py --model 10m --steps 2000

The text is the quickstart's (the source of Python's standard library, one document in forty held out), as bytes. Every
run has the same batches for a seed, a warm-up of a tenth and a cosine decay over `--steps`. AdamW has the learning rate
with the lowest final loss at the first seed; Muon keeps it for what AdamW updates, and has a grid for its matrices.
Reported is the first step at which Muon's validation loss is that of AdamW's last step, between two evaluations by a
straight line. Muon's own rate has not decayed by then: a plan of that many steps would end lower.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from provenance import commit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.quickstart import documents, split
from megalite.cli import program
from megalite.config import Config, build_config
from megalite.data.batch import Batch
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.cost import parameter_count
from megalite.optim.lr_schedule import learning_rate
from megalite.train.trainer import Trainer

MODELS: dict[str, dict[str, Any]] = {
    "small": {"layers": 4, "hidden_size": 96, "ffn_hidden_size": 256, "heads": 4, "kv_heads": 2},
    "10m": {"layers": 8, "hidden_size": 320, "ffn_hidden_size": 864, "heads": 5, "kv_heads": 5},
}
NOTES = {
    "small": "half a million parameters, for a few CPU minutes; --model 10m is the comparison at full size",
    "10m": "",
}
BYTES = 256
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "small": {"adamw": (1.5e-3, 3e-3, 6e-3), "muon": (3e-3, 6e-3, 1.2e-2)},
    "10m": {"adamw": (1.875e-4, 3.75e-4, 7.5e-4, 1.5e-3), "muon": (3e-3, 6e-3)},
}
"""Learning rates around the best of each model."""
EVALUATIONS = 20
HELD_OUT_SAMPLES = 32


@dataclass(frozen=True)
class Text:
    """Bytes to train on and held out, each one stream."""

    train: np.ndarray
    held_out: np.ndarray


def read_text() -> Text:
    """The quickstart's documents, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        streams = []
        for path in split(documents(None), Path(folder)):
            lines = path.read_text(encoding="utf-8").splitlines()
            text = "\n".join(json.loads(line)["text"] for line in lines)
            streams.append(np.frombuffer(text.encode(), dtype=np.uint8))
    return Text(*streams)


def batches_of(stream: np.ndarray, starts: np.ndarray, config: Config) -> list[Batch]:
    """Micro-batches of the samples that begin at `starts`."""
    size, length = config.train.micro_batch_size, config.train.seq_length
    rows = np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64)
    tokens = torch.from_numpy(rows)
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(size)]


def configuration(options: Options, kind: str, lr: float, muon_lr: float, seed: int) -> Config:
    return build_config(
        {
            "run": {"seed": seed},
            "model": {**MODELS[options.model], "vocab_size": BYTES, "max_positions": options.seq_length},
            "train": {
                "steps": options.steps,
                "seq_length": options.seq_length,
                "micro_batch_size": options.batch,
                "global_batch_size": options.batch,
                "precision": "fp32",
            },
            "optimizer": {
                "kind": kind,
                "lr": lr,
                "min_lr": 0.1 * lr,
                "muon_lr": muon_lr,
                "warmup_steps": options.steps // 10,
                "beta2": 0.95,
            },
        }
    )


def train(options: Options, text: Text, kind: str, lr: float, muon_lr: float, seed: int) -> dict[str, Any]:
    """One run: validation losses by step."""
    config = configuration(options, kind, lr, muon_lr, seed)
    mesh = Mesh()
    trainer = Trainer(config, mesh, select_kernels({}, mesh.device))
    trainer.initialise()
    random, length = np.random.default_rng(seed), options.seq_length
    held_out = np.linspace(0, len(text.held_out) - length - 1, HELD_OUT_SAMPLES).astype(np.int64)
    validation = batches_of(text.held_out, held_out, config)
    every, losses = max(1, options.steps // EVALUATIONS), {}
    began = time.process_time()
    for step in range(1, options.steps + 1):
        starts = random.integers(0, len(text.train) - length - 1, options.batch)
        trainer.step(batches_of(text.train, starts, config), learning_rate(step, config))
        if step % every == 0 or step == options.steps:
            loss, tokens = trainer.evaluate(validation)
            losses[step] = loss / tokens
    seconds = time.process_time() - began
    final = losses[options.steps]
    print(f"{kind:6s} lr {lr:g} matrices {muon_lr:g} seed {seed}: {final:.4f}, {seconds:.0f} CPU s", flush=True)
    return {"kind": kind, "lr": lr, "muon_lr": muon_lr, "seed": seed, "losses": losses, "cpu_seconds": seconds}


def crossing(losses: dict[int, float], goal: float) -> float | None:
    """The step at which the loss reaches `goal`; None if it does not."""
    last_step, last = 0, float("inf")
    for step, loss in losses.items():
        if loss <= goal:
            if last == float("inf"):
                return float(step)
            return last_step + (step - last_step) * (last - goal) / (last - loss)
        last_step, last = step, loss
    return None


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda run: list(run["losses"].values())[-1])


def compare(options: Options) -> dict[str, Any]:
    """The grids at the first seed, then the best of each at the others."""
    text = read_text()
    first, *others = options.seeds
    grid = GRIDS[options.model]
    adamw = [train(options, text, "adamw", lr, lr, first) for lr in grid["adamw"]]
    lr = best(adamw)["lr"]
    muon = [train(options, text, "muon", lr, own, first) for own in grid["muon"]]
    own = best(muon)["muon_lr"]
    pairs = [(best(adamw), best(muon))]
    for seed in others:
        pairs.append((train(options, text, "adamw", lr, lr, seed), train(options, text, "muon", lr, own, seed)))
    seeds = []
    for one, other in pairs:
        goal = one["losses"][options.steps]
        step = crossing(other["losses"], goal)
        seeds.append(
            {
                "seed": one["seed"],
                "adamw_loss": goal,
                "muon_loss": other["losses"][options.steps],
                "muon_steps_to_adamw_loss": step,
                "fewer_steps": options.steps / step if step else None,
                "cpu_seconds_of_a_step": other["cpu_seconds"] / one["cpu_seconds"],
            }
        )
    parameters = parameter_count(configuration(options, "adamw", 1e-3, 1e-3, 1).model)
    return {
        "model": options.model,
        "note": NOTES[options.model],
        "parameters": parameters,
        "steps": options.steps,
        "tokens_per_step": options.batch * options.seq_length,
        "text": {"train_bytes": len(text.train), "held_out_bytes": len(text.held_out)},
        "adamw_lr": lr,
        "muon_lr": own,
        "seeds": seeds,
        "runs": [*adamw, *muon, *(run for pair in pairs[1:] for run in pair)],
    }


@dataclass(frozen=True)
class Options:
    """Muon against AdamW on the quickstart's text."""

    model: Literal["small", "10m"] = "small"
    steps: int = 240
    """Optimizer steps of every run."""
    batch: int = 8
    """Samples of a step."""
    seq_length: int = 128
    seeds: tuple[int, ...] = (1, 2, 3)
    output: Path | None = None
    """A JSON file for the results."""


@program
def main() -> None:
    options = tyro.cli(Options)
    if options.steps < 10 or not options.seeds:
        raise UserError(f"--steps {options.steps} and --seeds {options.seeds}: give 10 steps or more and a seed")
    torch.set_num_threads(1)
    result = compare(options)
    result["machine"] = {
        "cpu": platform.machine(),
        "threads": 1,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/muon.py", *sys.argv[1:]]),
    }
    for seed in result["seeds"]:
        reached, fewer = seed["muon_steps_to_adamw_loss"], seed["fewer_steps"]
        ratio = "not reached" if reached is None else f"at step {reached:.0f}, {fewer:.2f} times fewer"
        print(f"seed {seed['seed']}: AdamW {seed['adamw_loss']:.4f} after {options.steps} steps, Muon {ratio}")
    if options.output:
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
