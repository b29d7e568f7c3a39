"""The way of a run on this machine, from its first step to a generated token: `gpu_session.sh`'s section `run`.

    python benchmarks/gpu_run.py --out DIR [--device cuda|cpu]

A tiny model on synthetic tokens is trained with what the large recipes use (attention chosen by measurement, selective
recomputation, validation, torch's profiler), saved, resumed, evaluated and asked to generate; then on two GPUs, where
there are two. DIR/run.json is written anew after every stage: command, exit, seconds, and what was wrong. Exits 1 if a
stage failed; the later ones run all the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite.data.indexed import IndexedWriter
from megalite.files import write_atomically

HERE = Path(__file__).resolve().parent
TRAIN = ("-m", "megalite.train")
LIMIT_SECONDS = 240
RECIPE = """
[model]
layers = 2
hidden_size = 128
ffn_hidden_size = 256
heads = 4
kv_heads = 2
head_dim = 32
vocab_size = 512
max_positions = 128
[data]
split = [9, 1]
document_mask = {documents}
[train]
steps = 10
seq_length = 128
global_batch_size = 8
micro_batch_size = 2
precision = "bf16"
recompute = "selective"
eval_interval = 5
eval_samples = 4
profile = [4, 5]
[optimizer]
lr = 1e-3
[checkpoint]
interval = 5
async_save = true
[log]
tensorboard = false
"""

Check = Callable[[str], str | None]
"""Standard output and error of a stage -> what is wrong with it, or None."""


class Session:
    """Stages in order, each with its own process, and the file that tells of them."""

    def __init__(self, out: Path, device: str) -> None:
        self.path, self.device = out / "run.json", device
        self.stages: list[dict[str, Any]] = []

    def stage(self, name: str, *arguments: str | Path, ranks: int = 1, check: Check = lambda output: None) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, *map(str, arguments)]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        code, output, begun = None, "", time.perf_counter()
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, cwd=HERE.parent, env=environment, timeout=LIMIT_SECONDS
            )
            code, output = result.returncode, result.stdout + result.stderr
            wrong = f"exit {code}" if code else check(output)
        except subprocess.TimeoutExpired as error:
            output = "".join(
                text if isinstance(text, str) else text.decode(errors="replace")
                for text in (error.stdout, error.stderr)
                if text
            )
            wrong = f"not done after {LIMIT_SECONDS} s"
        except (ValueError, KeyError, OSError, StopIteration) as error:
            wrong = f"unreadable: {error!r}"
        seconds = round(time.perf_counter() - begun, 1)
        row = {"stage": name, "command": " ".join(command[1:]), "exit": code, "wrong": wrong, "seconds": seconds}
        if wrong:
            row["output"] = output[-4000:]
        self.stages.append(row)
        document = {"device": self.device, "torch": torch.__version__, "stages": self.stages}
        write_atomically(self.path, json.dumps(document, indent=1) + "\n")
        print(f"{name}: {wrong or 'ok'} ({seconds} s)", flush=True)
        if wrong:
            print(output[-4000:], flush=True)

    def train(self, name: str, folder: Path, *, ranks: int = 1, documents: bool = False) -> None:
        """Train, stop, resume, evaluate, generate; the tokens are there already."""
        run, recipe, tokens = folder / name, folder / f"{name}.toml", folder / "tokens"
        recipe.write_text(RECIPE.format(documents=json.dumps(documents)))
        training = (*TRAIN, recipe, "--run.dir", run, "--run.device", self.device, "--data.train", tokens)
        layout = ("--parallel.tensor", "2") if ranks > 1 else ()
        chosen = "for q 128x2x" if self.device == "cuda" else "attention: cpu"

        def trained(output: str) -> str | None:
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            if chosen not in output:
                return f"the log does not tell which attention was taken ({chosen!r})"
            return None if all(math.isfinite(row["loss"]) for row in rows) else "a loss is not finite"

        def resumed(output: str) -> str | None:
            steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            if "resumed at step 5" not in output or steps != list(range(1, 11)):
                return f"did not go on from step 5: steps {steps}"
            kept = self.device != "cuda" or "(as before)" in output
            return trained(output) if kept else "attention was chosen anew, not taken from the checkpoint"

        def evaluated(output: str) -> str | None:
            loss = json.loads(next(line for line in output.splitlines() if line.startswith("{")))["loss"]
            return None if 0 < loss < 2 * math.log(512) else f"the loss is {loss}"

        def generated(output: str) -> str | None:
            ids = json.loads(next(line for line in output.splitlines() if line.startswith("{")))["ids"][0]
            return None if len(ids) >= 16 and all(0 <= x < 512 for x in ids) else f"the ids are {ids}"

        self.stage(f"{name}: train", *training, *layout, "--train.stop_after", "5", ranks=ranks, check=trained)
        self.stage(f"{name}: resume", *training, *layout, ranks=ranks, check=resumed)
        inference = ("--checkpoint", run, "--run.device", self.device, *layout)
        tool = HERE.parent / "tools"
        scored = ("--data", tokens, "--seq-length", "128", "--max-samples", "8")
        self.stage(f"{name}: evaluate", tool / "evaluate.py", "loss", *inference, *scored, ranks=ranks, check=evaluated)
        prompt = ("--prompt-ids", "[1, 2, 3]", "--max-new-tokens", "16", "--temperature", "0")
        for how, switch in (("", ()), (" by a graph", ("--cuda-graph",))):
            if self.device == "cuda" or not switch:
                command = (tool / "generate.py", *inference, *prompt, *switch)
                self.stage(f"{name}: generate{how}", *command, ranks=ranks, check=generated)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    session = Session(options.out, options.device)
    with tempfile.TemporaryDirectory() as name:
        folder, random = Path(name), np.random.default_rng(0)
        with IndexedWriter(folder / "tokens", np.uint16) as writer:
            for length in random.integers(20, 400, size=200):
                writer.add_document(random.integers(512, size=length))
            writer.finish({})
        session.train("single", folder)
        session.train("documents", folder, documents=True)
        if options.device == "cuda" and torch.cuda.device_count() > 1:
            session.train("tensor", folder, ranks=2)
    return int(any(stage["wrong"] for stage in session.stages))


if __name__ == "__main__":
    raise SystemExit(main())
