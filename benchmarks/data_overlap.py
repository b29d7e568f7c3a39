"""What data parallelism in the order of use wins, by the planner's simulation.

    python benchmarks/data_overlap.py [--output benchmarks/results/data_overlap.json]

Every recipe on its GPUs as it is, and the larger models with smaller global batches, under four practices: `before`
(parameters are gathered in backward order with the vectors last, the count of units queues behind them, and a rank
waits for the reductions of each of its stages), `gathers` and `reductions` (one of the two changed), and `now`
(vectors first and matrices in forward order, the count is a message to all ranks, reductions are waited for at the end
of the schedule). The rest of a step is the same. Nothing is run on GPUs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import simulated
from megalite.cli import program
from megalite.config import load_config
from megalite.config.check import check_layout
from megalite.files import write_atomically
from megalite.planning import DEVICES, Job
from megalite.planning.data_overlap import exposed_data
from megalite.planning.job import MEGALITE, Practice
from megalite.planning.stage_time import stage_works
from megalite.planning.step_time import step_time

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "recipes"
BEFORE = replace(MEGALITE, gathers_hide=False, reductions_end=False)
PRACTICES: dict[str, Practice] = {
    "before": BEFORE,
    "gathers": replace(BEFORE, gathers_hide=True),
    "reductions": replace(BEFORE, reductions_end=True),
    "now": MEGALITE,
}
# Recipe, GPUs, what is changed of it.
JOBS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("llama3-8b-64gpu", 64, {}),
    ("llama3-8b-64gpu", 64, {"train.global_batch_size": 64}),
    ("llama3-8b-64gpu", 64, {"parallel.zero": 1, "parallel.tensor": 2, "train.global_batch_size": 128}),
    ("llama3-70b-256gpu", 256, {}),
    ("llama3-70b-256gpu", 256, {"parallel.zero": 1}),
    ("llama3-70b-256gpu", 256, {"parallel.zero": 1, "train.global_batch_size": 128}),
    ("llama3-405b-8192gpu", 8192, {}),
    ("llama3-405b-8192gpu", 8192, {"parallel.zero": 0}),
    ("mixtral-8x7b-16gpu", 16, {}),
    ("qwen3-30b-a3b-32gpu", 32, {}),
    ("qwen3-30b-a3b-32gpu", 32, {"train.global_batch_size": 128}),
)


def row(recipe: str, gpus: int, changes: dict[str, Any], device: str) -> dict[str, Any]:
    """Milliseconds of a step, and of those that gathers and reductions expose, under each practice."""
    overrides = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    config = load_config(RECIPES / f"{recipe}.toml", overrides)
    check_layout(config, gpus)
    result: dict[str, Any] = {"recipe": recipe, "changes": changes, "gpus": gpus, "device": device}
    for name, practice in PRACTICES.items():
        job = replace(Job.of(config, gpus, DEVICES[device]), practice=practice)
        gathers, reductions = exposed_data(job, stage_works(job))
        result[name] = {
            "step_ms": round(1e3 * step_time(job).seconds, 2),
            "gathers_ms": round(1e3 * gathers, 2),
            "reductions_ms": round(1e3 * reductions, 2),
        }
    result["zero"], result["schedule"] = config.parallel.zero, config.parallel.schedule
    result["saved"] = round(1 - result["now"]["step_ms"] / result["before"]["step_ms"], 5)
    return result


@program
def main() -> None:
    tyro.cli(compare)


def compare(output: Path | None = None) -> None:
    """Simulate all jobs and print them.

    Args:
        output: JSON file to write.
    """
    rows = [row(*job, device) for device in ("h100", "h200") for job in JOBS]
    for each in rows:
        changes = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in each["changes"].items())
        exposes = " -> ".join(
            f"{each[name]['step_ms']:.0f} ms (gathers {each[name]['gathers_ms']:.1f}, "
            f"reductions {each[name]['reductions_ms']:.1f})"
            for name in ("before", "now")
        )
        print(f"{each['device']} {each['recipe']:20} {changes:45} {exposes}: {each['saved']:.2%}")
    if output is not None:
        document = {
            "what": "a step by the planner, in ms, and what of it gathers and reductions expose; nothing was measured",
            "machine": simulated("data_overlap.py"),
            "rows": rows,
        }
        write_atomically(output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
