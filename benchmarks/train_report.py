"""From measured steps to the numbers of `benchmarks/train.py`: rates, ratios, breakdown, bubble, table, plot."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from train_job import Job, quantiles

from megalite.config import build_config
from megalite.model.cost import peak_flops, training_flops_per_token
from megalite.schedule.schedules import build_schedule
from megalite.schedule.simulate import simulate

PHASES = ("data", "forward", "backward", "exposed", "optimizer", "other")
_EXPOSED = (
    "wait_pipeline", "wait_tensor", "wait_context", "wait_expert", "reduce", "wait_others", "wait_optimizer", "gather",
)  # fmt: skip
Turns = Sequence[Sequence[Mapping[str, Any]]]


def summarise(job: Job, turns: Turns, matmul_tflops: float) -> dict[str, Any]:
    """The row's numbers over all rounds. A step lasts as long as on its slowest rank; CPU seconds are summed."""
    walls = [[max(step) for step in zip(*(rank["walls"] for rank in ranks))] for ranks in turns]
    cpus = [[sum(step) for step in zip(*(rank["cpus"] for rank in ranks))] for ranks in turns]
    wall = quantiles([step for turn in walls for step in turn])
    model = build_config({"model": job.shape}).model
    full = training_flops_per_token(model, job.preset.seq_length)
    half = full - 6.0 * model.layers * model.heads * model.head_dim * job.preset.seq_length
    rate = job.tokens / wall["median"]
    devices = 1 if job.device == "cpu" else job.ranks
    tflops = rate * full / devices / 1e12
    peak = peak_flops(torch.device(job.device))
    memory = [[rank["gib"] for rank in ranks] for ranks in turns]
    return {
        "job": {name: value for name, value in vars(job).items() if name not in ("peer_path", "store")},
        "seconds_per_step": wall,
        "cpu_seconds_per_step": quantiles([step for turn in cpus for step in turn]),
        "tokens_per_second": rate,
        "tflops_per_device": tflops,
        "mfu": None if peak is None else tflops * 1e12 / peak,
        "mfu_half_causal": None if peak is None else tflops * half / full * 1e12 / peak,
        "fraction_of_matmul_rate": tflops / matmul_tflops,
        "peak_gib": statistics.median(sum(ranks) if job.device == "cpu" else max(ranks) for ranks in memory),
        "first_loss": turns[0][-1]["first_loss"],
        "rounds": {
            "seconds": [statistics.median(turn) for turn in walls],
            "cpu_seconds": [statistics.median(turn) for turn in cpus],
        },
        "breakdown": breakdown(turns[-1]),
        "bubble": bubble(job, turns[-1]),
        "kernels": turns[-1][0].get("kernels"),
        "attention": turns[-1][0].get("attention"),
    }


def measured(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The rows that have numbers."""
    return {text: row for text, row in rows.items() if "seconds_per_step" in row}


def breakdown(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean seconds over the ranks of PHASES; `exposed` is every wait for communication."""
    if any(not rank.get("phases") for rank in ranks):
        return None
    mean = {name: statistics.fmean(rank["phases"].get(name, 0.0) for rank in ranks) for name in ranks[0]["phases"]}
    mean["exposed"] = sum(mean.get(name, 0.0) for name in _EXPOSED)
    return {name: mean.get(name, 0.0) for name in PHASES}


def bubble(job: Job, ranks: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Idle share of the pipeline's ranks in the observed step, and in the simulation with the measured durations.

    Times of all ranks count from the moment in which they agreed on the step's norm, so they are comparable.
    """
    if job.pipeline == 1 or any(not rank.get("operations") for rank in ranks):
        return None
    durations: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    first, last, busy = float("inf"), -float("inf"), 0.0
    for rank in ranks:
        for name, start, end in rank["operations"]:
            parts = re.fullmatch(r"(\d+)([FBIW])(\d+)", name)
            if parts is None:
                continue
            waited = sum(min(e, end) - max(s, start) for _, s, e in rank["waits"] if s < end and e > start)
            first, last, busy = min(first, start + waited), max(last, end), busy + end - start - waited
            durations[parts[2], int(parts[1])].append(end - start - waited)
    stages = 1 + max(stage for _, stage in durations)
    kinds = {kind for kind, _ in durations}
    cost = {kind: [statistics.median(durations[kind, stage] or [0.0]) for stage in range(stages)] for kind in kinds}
    chunks = stages // job.pipeline
    plan = build_schedule(job.schedule, job.pipeline, job.micro_batches, chunks)
    return {"measured": 1.0 - busy / (len(ranks) * (last - first)), "simulated": simulate(plan, cost).bubble}


def ratio(own: Mapping[str, Any], other: Mapping[str, Any], measure: str) -> tuple[float, float, float]:
    """How many times less `own` takes than `other`, round by round: median, lowest, highest."""
    ratios = [theirs / ours for ours, theirs in zip(own["rounds"][measure], other["rounds"][measure])]
    return statistics.median(ratios), min(ratios), max(ratios)


def _rivals(text: str, jobs: Mapping[str, Job]) -> list[str]:
    """The rows that `text` is set against: peers in the same layout, or in one process where they have none."""
    job = jobs[text]
    others = [name for name, other in jobs.items() if other.runner not in ("megalite", "bare")]
    alike = [name for name in others if jobs[name].layout == job.layout and jobs[name].runner != "plain"]
    return [name for name in others if jobs[name].runner == "plain"] + alike


def tabulate(result: dict[str, Any], jobs: Mapping[str, Job], console: Console) -> None:
    """Print the rows, and put each row's ratios to its rivals into the result."""
    rows, on_cpu = measured(result["rows"]), result["machine"]["device"] == "cpu"
    measure, unit = ("cpu_seconds", "CPU s") if on_cpu else ("seconds", "s")
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in result["machine"]["matmul_tflops"].items())
    console.print(f"model {result['model']}; matmul TFLOP/s: {rates}; MFU: {result['mfu']}")
    names = ["row", "tokens/s", "s/step (p20, p80)", "CPU s/step", "TFLOP/s", "of matmul", "MFU (half)", "GiB", "loss"]
    table = Table(*names, *PHASES, "bubble (simulated)", box=None, header_style="bold")
    for text, row in rows.items():
        wall, phases, idle = row["seconds_per_step"], row["breakdown"], row["bubble"]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%} ({row['mfu_half_causal']:.1%})"
        table.add_row(
            text,
            f"{row['tokens_per_second']:.0f}",
            f"{wall['median']:.3f} ({wall['p20']:.3f}, {wall['p80']:.3f})",
            f"{row['cpu_seconds_per_step']['median']:.3f}",
            f"{row['tflops_per_device']:.3g}",
            f"{row['fraction_of_matmul_rate']:.1%}",
            mfu,
            f"{row['peak_gib']:.2f}",
            "-" if row["first_loss"] is None else f"{row['first_loss']:.2f}",
            *(["-"] * len(PHASES) if phases is None else [f"{phases[name]:.3f}" for name in PHASES]),
            "-" if idle is None else f"{idle['measured']:.1%} ({idle['simulated']:.1%})",
        )
    console.print(table)
    console.print(f"times faster than, in {unit} a step: median (lowest, highest) of the rounds")
    for text, row in rows.items():
        if jobs[text].runner != "megalite":
            continue
        row["faster_than"] = {name: ratio(row, rows[name], measure) for name in _rivals(text, jobs) if name in rows}
        parts = [f"{name} {mid:.2f} ({low:.2f}, {high:.2f})" for name, (mid, low, high) in row["faster_than"].items()]
        console.print(f"  {text}: {'; '.join(parts)}")
    for text, whole in extrapolate(rows, jobs).items():
        console.print(f"  {text}: {whole}")
    result["extrapolated"] = extrapolate(rows, jobs)
    for text, row in result["rows"].items():
        if "error" in row:
            console.print(f"  {text}: failed: {row['error']}", markup=False)


def extrapolate(rows: Mapping[str, Any], jobs: Mapping[str, Job]) -> dict[str, dict[str, float]]:
    """Where rows differ in `layers` alone: seconds of a layer, of the rest, and tokens/s of the whole model."""
    found = {}
    known = {name: job for name, job in jobs.items() if name in rows}
    for deep, job in known.items():
        for shallow, other in known.items():
            if other.layers < job.layers and other == job.replace(layers=other.layers):
                seconds = [rows[name]["seconds_per_step"]["median"] for name in (shallow, deep)]
                layer = (seconds[1] - seconds[0]) / (job.layers - other.layers)
                rest = seconds[1] - layer * job.layers
                whole = rest + layer * job.preset.model["layers"]
                found[deep] = {"layer_seconds": layer, "rest_seconds": rest, "tokens_per_second": job.tokens / whole}
    return found


def draw(result: Mapping[str, Any], jobs: Mapping[str, Job], path: Path) -> None:
    """Bars: seconds a step (CPU seconds on CPUs) of every row, with the 20th and 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    on_cpu = result["machine"]["device"] == "cpu"
    key = "cpu_seconds_per_step" if on_cpu else "seconds_per_step"
    rows = measured(result["rows"])
    if not rows:
        return
    names = sorted(rows, key=lambda name: (jobs[name].precision, -rows[name][key]["median"]))
    values = [rows[name][key] for name in names]
    medians = [value["median"] for value in values]
    spread = [[v["median"] - v["p20"] for v in values], [v["p80"] - v["median"] for v in values]]
    colours = ["tab:blue" if jobs[name].runner == "megalite" else "tab:gray" for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.35 * len(names) + 1.2))
    axes.barh(names, medians, xerr=spread, color=colours, ecolor="black", capsize=2)
    axes.set_xlabel("CPU seconds per step, all processes" if on_cpu else "seconds per step")
    axes.set_title(f"{result['model']}: {jobs[names[0]].tokens} tokens a step, {result['machine']['processor']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
