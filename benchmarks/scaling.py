"""How megalite scales over several GPUs, simulated by its planner from published measurements.

    python benchmarks/scaling.py [--devices h100 h200] [--output benchmarks/results/scaling.json]

Tensor parallel: tokens/s a GPU in Llama-shaped layers, as a share of one GPU's, and what the rest is lost to. Pipeline:
a step beyond the ideal bubble of its schedule, by unequal stages and transfers. Inputs and checks stand beside them.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.planner.published import LLAMA3_8B, LLAMA3_70B, scaling_points
from benchmarks.planner.queues import queued_makespan
from benchmarks.provenance import simulated
from megalite.cli import program
from megalite.config.schema import AUTO_OVERLAP_SPLITS
from megalite.errors import UserError
from megalite.files import write_atomically
from megalite.planning import DEVICES, Device, Job
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import link, product_rate
from megalite.planning.job import MEGALITE, Practice
from megalite.planning.memory import worst_rank
from megalite.planning.stage_time import TimeParts, pipeline_costs, stage_works
from megalite.planning.step_time import step_time
from megalite.schedule.ops import Plan
from megalite.schedule.simulate import simulate

Row = dict[str, Any]
MODELS = {4096: LLAMA3_8B, 8192: LLAMA3_70B}
TENSOR_GOALS, PIPELINE_GOAL = {4096: 0.75, 8192: 0.88}, 0.03
SCHEDULES = {"1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}
# Hidden size, tensor, data: the pipeline within a node; across nodes that copies fill; across nodes of tensor ranks.
PIPELINES = ((4096, 1, 1), (4096, 1, 8), (8192, 8, 1))


def inputs(device: Device) -> list[Row]:
    """All that is taken as given, from megalite/planning/hardware.py and job.py."""
    forward, backward = (share * device.matmul_flops / 1e12 for share in device.attention_efficiency)
    over, adapter = link(device, 8, 1), device.network_bandwidth * device.network_efficiency
    rows = (
        ("large products", f"{product_rate(device, 2) / 1e12:.0f} TFLOP/s", "790 measured; nine tenths sustained"),
        ("attention", f"{forward:.0f}, {backward:.0f} TFLOP/s", "at best 685, 539: FlashAttention 3, causal, 8192"),
        ("collectives in a node", f"{over.bandwidth / 1e9:.0f} GB/s", "360 to 370: nccl-tests issues 326, 212"),
        ("their start", f"{over.latency * 1e6:.0f} us", "12 to 16 for the smallest: DeepEP issue 303 (H20)"),
        ("cost of hiding them", f"{MEGALITE.hiding_cost:.0%} of them", "pytorch pull requests 172714, 179937"),
        ("network adapter", f"{adapter / 1e9:.0f} GB/s", "46 to 48: nccl-tests issue 290"),
        ("memory", f"{device.memory_bandwidth / 1e12:.2f} TB/s", "data sheet; fused kernels are taken to reach it"),
        ("launching a layer", f"{device.layer_overhead * 1e6:.0f} us", "assumed; nowhere the limit here"),
    )
    return [dict(zip(("input", "value", "source"), row)) for row in rows]


def tensor_job(
    device: Device,
    hidden: int,
    tensor: int,
    practice: Practice = MEGALITE,
    layers: int = 3,
    splits: int = AUTO_OVERLAP_SPLITS,
    **fields: Any,
) -> Job:
    """One sequence of 8192 a micro-batch, four micro-batches for each GPU; `fields` where the layer is split."""
    job = Job(Architecture(replace(MODELS[hidden].model, layers=layers)), device, 8192, 1, 4 * tensor, tensor=tensor)
    job = replace(job, sequence=tensor > 1, practice=practice, overlap_splits=splits)
    return replace(job, **fields) if tensor > 1 else job


def layers_that_fit(device: Device, hidden: int) -> int:
    """Into one GPU, with embedding and output layer, optimizer and nothing recomputed; at least 1."""
    more = (n for n in itertools.count(2) if worst_rank(tensor_job(device, hidden, 1, layers=n)).total > device.memory)
    return next(more) - 1


def layer(job: Job) -> TimeParts:
    """Seconds of one layer and micro-batch by kind: the middle of three stages has neither embedding nor output."""
    work = stage_works(replace(job, pipeline=3))[1]
    return work.forward.plus(work.backward)


def tensor_share(
    device: Device,
    hidden: int,
    tensor: int,
    practice: Practice = MEGALITE,
    splits: int = AUTO_OVERLAP_SPLITS,
    **fields: Any,
) -> Row:
    """Share of one GPU's tokens/s in a layer, and the shares of a GPU's time that are lost: all together 1."""
    alone, work = (layer(tensor_job(device, hidden, size, practice, splits=splits, **fields)) for size in (1, tensor))
    lost = TimeParts(*((tensor * mine - own) / (tensor * work.seconds) for mine, own in zip(work, alone)))
    row = {"share": alone.seconds / (tensor * work.seconds), "products": lost.products + lost.attention}
    return row | {"communication": lost.tensor, "elementwise": lost.elementwise, "host": lost.launch}


def tensor_rows(device: Device) -> list[Row]:
    """Of a layer, and in `step` of a whole step of the layers that fit: with embedding, output layer and optimizer."""
    rows = []
    for hidden, tensor in itertools.product(MODELS, (1, 2, 4, 8)):
        layers = layers_that_fit(device, hidden)
        jobs = [tensor_job(device, hidden, size, layers=layers) for size in (1, tensor)]
        alone, speed = (job.tokens_per_step / step_time(job).seconds / job.world for job in jobs)
        row: Row = {"hidden": hidden, "tensor": tensor} | tensor_share(device, hidden, tensor)
        row |= {"layers": layers, "tokens_per_s_a_gpu": speed, "step": speed / alone}
        rows.append(row | {"reached": row["share"] >= TENSOR_GOALS[hidden] if tensor == 8 else "-"})
    return rows


def sensitivity(device: Device) -> list[Row]:
    """Share of tensor 8 where one input is another: what decides the answer, and what the trainer could still gain."""
    change, habit = functools.partial(replace, device), functools.partial(replace, MEGALITE)
    cases: dict[str, tuple[Device, Practice]] = {"as the trainer does it": (device, MEGALITE)}
    whole: dict[str, tuple[Device, Practice]] = {"in one piece": (device, MEGALITE)}
    for factor in (0.7, 1.3, 2.0):
        cases[f"links x {factor}"] = change(link_bandwidth=factor * device.link_bandwidth), MEGALITE
    cases["products x 1.1"] = change(matmul_efficiency=1.1 * device.matmul_efficiency), MEGALITE
    whole["nothing hidden"] = device, habit(overlaps_tensor="none")
    cases["hiding costs nothing"] = device, habit(hiding_cost=0.0)
    cases["copy engines"] = device, habit(hiding_cost=0.13)
    whole["all under its own product, NCCL's kernels"] = device, habit(overlaps_tensor="all")
    whole["all under its own product, copy engines"] = device, habit(overlaps_tensor="all", hiding_cost=0.13)
    cases["free communication"] = change(link_bandwidth=math.inf, link_latency=0.0), MEGALITE
    return [
        {"tensor 8": name}
        | {f"hidden {hidden}": tensor_share(gpu, hidden, 8, practice, splits)["share"] for hidden in MODELS}
        for of_splits, splits in ((cases, AUTO_OVERLAP_SPLITS), (whole, 1))
        for name, (gpu, practice) in of_splits.items()
    ]


def excess(plan: Plan, costs: Mapping[str, list[float]], transfer: float) -> Row:
    """A step, and by how much unequal stages, and then transfers, make it longer than the schedule's ideal.

    `transfers` queue up as in the engine, also with links of 0.7 and 1.3 times the speed; the planner's are `unqueued`.
    """
    equal = simulate(plan, {kind: sum(each) / len(each) for kind, each in costs.items()})
    free = simulate(plan, costs).makespan
    step, slow, fast = (queued_makespan(plan, costs, transfer / links) for links in (1.0, 0.7, 1.3))
    row = {"bubble": equal.bubble, "step_ms": 1e3 * step, "stages": free / equal.makespan - 1}
    row |= {"transfers": step / free - 1, "links x 0.7": slow / free - 1, "links x 1.3": fast / free - 1}
    return row | {"unqueued": simulate(plan, costs, transfer).makespan / free - 1}


def pipeline_rows(device: Device) -> list[Row]:
    """Whole models, four micro-batches a rank."""
    rows = []
    for hidden, tensor, data in PIPELINES:
        base = replace(tensor_job(device, hidden, tensor, layers=MODELS[hidden].model.layers), data=data)
        for ranks, (name, chunks) in itertools.product((4, 8), SCHEDULES.items()):
            job = replace(base, pipeline=ranks, schedule=name, virtual_stages=chunks, micro_batches=4 * ranks)
            row: Row = {"hidden": hidden, "tensor": tensor, "data": data, "pipeline": ranks, "schedule": name}
            row |= {"virtual": chunks, "micro": 4 * ranks} | excess(job.plan(), *pipeline_costs(job))
            rows.append(row | {"reached": row["transfers"] <= PIPELINE_GOAL})
    return rows


def show(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="")
    for name, cell in rows[0].items():
        table.add_column(name, justify="left" if isinstance(cell, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console(width=170).print(table)


@dataclass
class Arguments:
    devices: tuple[str, ...] = ("h100", "h200")
    """Kinds of GPU, of megalite.planning.DEVICES."""
    output: Path | None = None
    """Write everything here as JSON."""


@program
def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    gpus = [name for name, device in DEVICES.items() if device.is_gpu]
    if wrong := [name for name in arguments.devices if name not in gpus]:
        raise UserError(f"--devices {wrong[0]}: no such GPU; known: {', '.join(gpus)}")
    tables = {"Measured on H100, and predicted": [vars(one) | {"error": one.error} for one in scaling_points()]}
    for device in (DEVICES[name] for name in arguments.devices):
        parts = {
            "inputs": inputs,
            "tensor parallel": tensor_rows,
            "sensitivity": sensitivity,
            "pipeline": pipeline_rows,
        }
        tables |= {f"{device.name}: {title}": rows(device) for title, rows in parts.items()}
    for title, made in tables.items():
        show(title, made)
    if arguments.output is not None:
        document = {"machine": simulated("scaling.py"), "tables": tables}
        write_atomically(arguments.output, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
