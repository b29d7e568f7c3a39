"""Plans as terminal tables: one plan, the ranking of a search, and its winner as text and TOML."""

from __future__ import annotations

import tomli_w
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megalite.model.cost import FORMULA, FORMULA_ADAPTER, FORMULA_HALF
from megalite.planning.estimate import Plan
from megalite.planning.hardware import GIB, Device
from megalite.planning.job import Job
from megalite.planning.search import Ranking


def layout_words(job: Job) -> str:
    """`tensor 8 (inputs kept), pipeline 4 (interleaved, 5 stages a rank), 8 copies, ZeRO-1`."""
    ways = ["inputs kept"] if job.keep_gathered else []
    ways += ["two batches at once"] if job.two_batch_overlap else []
    how = f" ({', '.join(ways)})" if ways else ""
    words = [f"tensor {job.tensor}{how}"] if job.tensor > 1 else []
    if job.pipeline > 1:
        virtual = f", {job.virtual_stages} stages a rank" if job.virtual_stages > 1 else ""
        words.append(f"pipeline {job.pipeline} ({job.schedule}{virtual})")
    if job.context > 1:
        words.append(f"context {job.context} ({job.context_mode})")
    if job.expert > 1:
        words.append(f"experts over {job.expert}")
    words.append(f"{job.data} {'copy' if job.data == 1 else 'copies'} of the model")
    words.append(f"ZeRO-{job.zero}")
    return ", ".join(words)


_WORK = ("matrix products", "attention", "element-wise")


def _count(value: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _model(plan: Plan) -> Table:
    job, architecture = plan.job, plan.job.architecture
    table = _table("Model", "", "")
    table.show_header = False
    table.add_row("parameters", f"{architecture.parameters:,}")
    if architecture.frozen:
        what = f"parameters that are trained ({architecture.adapter.kind})"
        table.add_row(what, f"{plan.trained_parameters:,}")
    table.add_row("FLOPs a token, attention counted full", f"{plan.flops_per_token:.4e}")
    table.add_row("FLOPs a token, attention counted half", f"{plan.half_flops_per_token:.4e}")
    if job.recompute != "none":
        table.add_row(f"the first with recompute = {job.recompute}", f"{plan.hardware_flops_per_token:.4e}")
    return table


def _memory(plan: Plan) -> Table:
    memory, job = plan.memory, plan.job
    ranks = f"pipeline rank {memory.pipeline_rank} of {job.pipeline}" if job.pipeline > 1 else "each rank"
    table = _table(f"Memory of {ranks}", "at its worst", "GiB")
    for name, value in memory.parts.items():
        if value:
            table.add_row(name, f"{value / GIB:.2f}")
    table.add_section()
    table.add_row("together", f"{memory.total / GIB:.2f}")
    if job.device.is_gpu:
        table.add_row(f"of {job.device.name}", f"{job.device.memory / GIB:.2f}")
    return table


def _time(plan: Plan) -> Table:
    seconds = plan.time.seconds
    whose = ", mean of the pipeline ranks" if plan.job.pipeline > 1 else ""
    table = _table(f"A step of {plan.job.tokens_per_step:,} tokens{whose}", "part", "seconds", "share")
    for name, value in plan.time.parts.items():
        if value >= 1e-3 * seconds:
            table.add_row(name, f"{value:.3f}", f"{value / seconds:.1%}")
    table.add_section()
    table.add_row("together", f"{seconds:.3f}", "")
    return table


def _run(plan: Plan) -> Table:
    job = plan.job
    rate = plan.tokens_per_second
    table = _table(f"The run: {_count(plan.tokens)} tokens", "", "")
    table.show_header = False
    table.add_row("tokens a second, all devices", f"{rate:,.0f}")
    table.add_row("tokens a second, one device", f"{rate / job.world:,.0f}")
    table.add_row("model TFLOP/s, one device", f"{plan.flops_per_token * rate / job.world / 1e12:.4g}")
    if plan.mfu is not None:
        table.add_row(f"MFU of {job.device.matmul_flops / 1e12:.0f} TFLOP/s", f"{plan.mfu:.1%}")
    table.add_row("pipeline idle, mean of the ranks", f"{plan.time.bubble:.1%}")
    table.add_row("days", f"{plan.days:,.2f}")
    if plan.cost is not None:
        table.add_row(f"dollars, at {plan.price_per_hour:g} a device-hour", f"{plan.cost:,.0f}")
    if job.reads == "loss":
        table.add_row("tokens a parameter", f"{plan.tokens / job.architecture.parameters:.2f}")
        table.add_row("of Chinchilla's 20 a parameter", f"{plan.chinchilla_ratio:.2f} x")
    return table


def verdict(plan: Plan) -> str:
    """One sentence: whether it fits, and if not, what to do."""
    total, device = plan.memory.total / GIB, plan.job.device
    if plan.fits is None:
        return f"{total:.2f} GiB a process beyond what Python and torch take."
    if plan.fits:
        return f"It fits: {total:.1f} of {device.memory / GIB:.1f} GiB."
    return f"It does not fit: {total:.1f} of {device.memory / GIB:.1f} GiB; --search looks for layouts that do."


def _passes_words(job: Job) -> str:
    """What the FLOPs of a token are the sum of, where that is more than one model's training."""
    if sum(each.forward + each.training for each in job.passes) == 1:
        return ""
    words = [
        f"{each.training} x training + {each.forward} x forward"
        + (" of a scalar head" if each.head == "scalar" else "")
        for each in job.passes
    ]
    return "\nsummed over the models of a step: " + "; ".join(words) + "; a forward pass is a third"


def render(plan: Plan) -> Group:
    """The whole plan as tables."""
    job = plan.job
    rollout = job.rollout
    a_step = f"{job.micro_batches} {'a step' if rollout is None else 'an update'}"
    head = (
        f"{job.world} x {job.device.name}: {layout_words(job)}; micro-batches of {job.micro_batch_size}, "
        f"{a_step}, recompute = {job.recompute}"
    )
    if rollout is not None:
        head += (
            f"\nA copy of the model writes {rollout.answers} answers of up to {rollout.tokens:,} tokens a step, "
            f"{rollout.batch} at a time, to prompts of up to {rollout.prompt:,}; then {rollout.updates} updates."
        )
    frozen = job.architecture.frozen
    notes = f"FLOPs, full: {FORMULA_ADAPTER if frozen else FORMULA}\nFLOPs, half: "
    notes += f"{'the same with 6 * layers' if frozen else FORMULA_HALF}{_passes_words(job)}"
    return Group(Text(head, style="bold"), _model(plan), _memory(plan), _time(plan), _run(plan), verdict(plan), notes)


def overrides_toml(job: Job) -> str:
    """The layout as TOML overrides for a recipe."""
    parallel = {
        "tensor": job.tensor,
        "pipeline": job.pipeline,
        "context": job.context,
        **({"expert": job.expert} if job.architecture.model.experts else {}),
        "sequence": job.sequence,
        "keep_gathered": job.keep_gathered,
        "two_batch_overlap": job.two_batch_overlap,
        "zero": job.zero,
        "schedule": job.schedule,
        "virtual_stages": job.virtual_stages,
    }
    return tomli_w.dumps(
        {"parallel": parallel, "train": {"micro_batch_size": job.micro_batch_size, "recompute": job.recompute}}
    )


def ranking_table(ranking: Ranking) -> Table:
    """The fastest layouts, one a row."""
    splits = any(plan.job.expert > 1 for plan in ranking.plans)
    sizes = ("tp", "pp", "cp", *(("ep",) if splits else ()), "dp")
    table = _table("Fastest layouts that fit", "", *sizes, "schedule", "zero", "mbs", "recompute")
    for column in ("tokens/s/device", "MFU", "idle", "GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for place, plan in enumerate(ranking.plans, 1):
        job = plan.job
        schedule = f"{job.schedule} x {job.virtual_stages}" if job.virtual_stages > 1 else job.schedule
        table.add_row(
            str(place),
            str(job.tensor),
            str(job.pipeline),
            str(job.context),
            *((str(job.expert),) if splits else ()),
            str(job.data),
            schedule if job.pipeline > 1 else "",
            str(job.zero),
            str(job.micro_batch_size),
            job.recompute,
            f"{plan.tokens_per_second / job.world:,.0f}",
            f"{plan.mfu:.1%}" if plan.mfu is not None else "",
            f"{plan.time.bubble:.1%}",
            f"{plan.memory.total / GIB:.1f}",
        )
    return table


def explain(best: Plan, own: Plan | None) -> str:
    """Why the winner is fast, and what it gains over the recipe's own layout (None: that is refused)."""
    job, parts, seconds = best.job, best.time.parts, best.time.seconds
    work = sum(parts[name] for name in _WORK)
    lost = sorted(((value, name) for name, value in parts.items() if value), reverse=True)
    overhead = [
        f"{name} {value / seconds:.1%}" for value, name in lost if name not in _WORK and value > 0.002 * seconds
    ]
    sentences = [f"Best: {layout_words(job)}, micro-batches of {job.micro_batch_size}, recompute = {job.recompute}."]
    rest = ", ".join(overhead) or "next to nothing"
    what = "computation" if best.job.rollout is None else "computation of the policy's updates"
    sentences.append(f"{work / seconds:.1%} of a step is {what}; besides: {rest}.")
    if job.device.is_gpu:
        sentences.append(f"{verdict(best)} Memory is fullest in the {best.memory.moment}.")
    if own is None:
        sentences.append("The recipe's own layout is refused on so many devices.")
    elif own.fits is False:
        sentences.append(f"The recipe's own layout ({layout_words(own.job)}) does not fit.")
    else:
        gain = best.tokens_per_second / own.tokens_per_second
        sentences.append(
            f"The recipe's own layout ({layout_words(own.job)}) is predicted at 1/{gain:.2f} of its speed."
        )
    return " ".join(sentences)


def render_search(ranking: Ranking, own: Plan | None, device: Device) -> Group:
    """The ranking, and the winner as text and TOML."""
    tried = (
        f"{ranking.refused + ranking.too_large + ranking.fitting:,} layouts: {ranking.refused:,} refused, "
        f"{ranking.too_large:,} too large for {device.name}, {ranking.fitting:,} fit."
    )
    best = ranking.plans[0]
    return Group(ranking_table(ranking), tried, "", explain(best, own), "", overrides_toml(best.job).rstrip())
