"""Tensor parallelism over eight GPUs with its collectives in pieces, simulated by the planner.

    python benchmarks/tensor_overlap.py [--output benchmarks/results/tensor_overlap.json]

For each number of pieces (1: whole, as before there were any): tokens/s a GPU in a layer as a share of one GPU's, and
the milliseconds of a layer and micro-batch by kind. Then the share with `parallel.keep_gathered` and
`parallel.two_batch_overlap`, and what it would be if one input were another. All inputs are the planner's own
(benchmarks/scaling.py prints them, with sources); sequences are of 8192 tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.provenance import simulated
from benchmarks.scaling import MODELS, TENSOR_GOALS, layer, show, tensor_job, tensor_share
from megalite.cli import program
from megalite.config.schema import AUTO_OVERLAP_SPLITS
from megalite.files import write_atomically
from megalite.planning import DEVICES, Device
from megalite.planning.job import MEGALITE, Practice
from megalite.planning.tensor_time import LayerCommunication

Row = dict[str, Any]
TENSOR, SPLITS = 8, (1, 2, 3, 4)


def pieces(device: Device) -> list[Row]:
    """By hidden size and number of pieces; `communication` is what no product hides."""
    rows = []
    for hidden in MODELS:
        for splits in SPLITS:
            job = tensor_job(device, hidden, TENSOR, splits=splits)
            work = layer(job)
            talk = LayerCommunication(job, attention_backward=0.0)
            share = tensor_share(device, hidden, TENSOR, splits=splits)["share"]
            row: Row = {"hidden": hidden, "pieces": splits, "share": share, "goal": TENSOR_GOALS[hidden]}
            row |= {"products_ms": 1e3 * work.products, "attention_ms": 1e3 * work.attention}
            row |= {"elementwise_ms": 1e3 * work.elementwise, "communication_ms": 1e3 * work.tensor}
            rows.append(row | {"of_it_forward_ms": 1e3 * talk.forward()})
    return rows


def ways(device: Device) -> list[Row]:
    """By what is kept and run at once."""
    kept, paired = {"keep_gathered": True}, {"two_batch_overlap": True}
    engines = replace(MEGALITE, hiding_cost=0.13)
    cases: dict[str, tuple[Practice, dict[str, bool]]] = {
        "the default": (MEGALITE, {}),
        "keep_gathered": (MEGALITE, kept),
        "two_batch_overlap": (MEGALITE, paired),
        "both": (MEGALITE, kept | paired),
        "both, were collectives on copy engines": (engines, kept | paired),
    }
    return [
        {"case": name}
        | {f"hidden {hidden}": tensor_share(device, hidden, TENSOR, habit, **fields)["share"] for hidden in MODELS}
        for name, (habit, fields) in cases.items()
    ]


def remaining(device: Device) -> list[Row]:
    """What the default's share would be with one input changed."""
    cases = {
        "as the trainer does it": (device, MEGALITE),
        "a collective starts in half the time": (replace(device, link_latency=device.link_latency / 2), MEGALITE),
        "gathers and sums on copy engines": (device, replace(MEGALITE, hiding_cost=0.13)),
        "hiding costs nothing": (device, replace(MEGALITE, hiding_cost=0.0)),
        "links of twice the rate": (replace(device, link_bandwidth=2 * device.link_bandwidth), MEGALITE),
    }
    return [
        {"case": name} | {f"hidden {hidden}": tensor_share(gpu, hidden, TENSOR, practice)["share"] for hidden in MODELS}
        for name, (gpu, practice) in cases.items()
    ]


def tables() -> dict[str, list[Row]]:
    made = {}
    for name in ("h100", "h200"):
        device = DEVICES[name]
        made[f"{device.name}: pieces"] = pieces(device)
        made[f"{device.name}: ways"] = ways(device)
        made[f"{device.name}: {AUTO_OVERLAP_SPLITS} pieces, were one input another"] = remaining(device)
    return made


@dataclass
class Arguments:
    output: Path | None = None
    """Write everything here as JSON."""


@program
def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    made = tables()
    for title, rows in made.items():
        show(title, rows)
    if arguments.output is not None:
        document = {"machine": simulated("tensor_overlap.py"), "tables": made}
        write_atomically(arguments.output, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
