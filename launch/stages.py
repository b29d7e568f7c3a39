"""The stages of the quickstart: each is a command that a user would type, shown and then run."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megalite.affinity import own_cores
from megalite.errors import FINISHED, STOPPED
from megalite.processes import Processes, outcome

ROOT = Path(__file__).resolve().parent.parent
MOST_COPIES = 2
"""So many have a part in each of the small batches of quickstart-sft.toml and quickstart-grpo.toml."""


def layout(processes: int) -> list[str]:
    """All three kinds of parallelism as far as the number of ranks allows: tensor 2, then pipeline 2, the rest data."""
    tensor = 2 if processes % 2 == 0 else 1
    pipeline = 2 if processes % 4 == 0 else 1
    return ["--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline)]


@dataclass(frozen=True)
class Ranks:
    """How many ranks train, and on what: `cpu` or `cuda`."""

    processes: int
    device: str

    def copies(self) -> Ranks:
        """Fewer ranks, for small batches: each a copy of the model, on the CPU at most one a core."""
        most = self.processes if self.device == "cuda" else min(self.processes, len(own_cores()))
        return Ranks(math.gcd(most, MOST_COPIES), self.device)

    def training(self, recipe: str, run_dir: Path, tokenizer: Path, *layout: str) -> list[str]:
        """The command that trains as `launch/recipes/RECIPE.toml` says, but for the data."""
        command = ["bash", "launch/local.sh", f"launch/recipes/{recipe}.toml", "--processes", str(self.processes)]
        command += [*layout, "--run.dir", str(run_dir), "--run.device", self.device]
        return [*command, "--data.tokenizer", str(tokenizer)]


def run(title: str, *command: str | Path, capture: bool = False) -> str:
    """Show and run one command; its failure, whose message it has printed itself, ends the quickstart with its code."""
    words = [str(word) for word in command]
    print(f"\n== {title}\n$ {shlex.join(words)}", flush=True)
    program = [sys.executable, *words[1:]] if words[0] == "python" else words
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    processes = Processes()
    with processes.listening():
        child = processes.start(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE if capture else None)
        said = child.stdout.read() if child.stdout else ""
        code = outcome([code for _, code in processes.wait()], processes.requests)
    if code != FINISHED or processes.requests:
        print(f"the stage “{title}” ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code or STOPPED)
    return said
