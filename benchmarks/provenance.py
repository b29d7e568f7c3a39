"""Where a committed number comes from: commit, versions, machine and command."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch


def commit() -> str:
    """The short name of this checkout's commit; empty outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def simulated(script: str) -> dict[str, str]:
    """Of what the planner simulates without a GPU."""
    return {
        "simulated on": f"{platform.machine()}, no GPU",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit(),
        "command": " ".join([f"benchmarks/{script}", *sys.argv[1:]]),
    }
