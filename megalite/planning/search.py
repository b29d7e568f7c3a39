"""All layouts of a job, ranked by predicted speed among those that fit.

What is tried: tensor sizes within a node, pipeline sizes, context sizes for long sequences, shares of the experts,
schedules with their virtual stages, ZeRO levels, micro-batch sizes and recomputation. The model, the global batch, the
sequence and the number of devices stay; `keep_gathered` and `two_batch_overlap` are tried where the recipe has them on.
Whether a layout is allowed is asked of `check_combinations`, the trainer's own
rules.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalite.config import Config
from megalite.config.check import check_bounds, check_combinations
from megalite.errors import UserError
from megalite.planning.estimate import Plan, planned_tokens
from megalite.planning.hardware import GIB, Device
from megalite.planning.job import Job, reward_model_of
from megalite.planning.memory import RankMemory, worst_rank
from megalite.planning.step_time import least_step_seconds, step_time
from megalite.schedule.schedules import SCHEDULES

VIRTUAL_STAGES = (1, 2, 3, 4, 5, 6, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTE = ("none", "selective", "full")
LEAST_PART = 8192
"""Tokens of a sequence that each context rank should get at least; shorter sequences are not worth a split."""


@dataclass(frozen=True)
class Ranking:
    """The fastest layouts first, and what became of the others."""

    plans: tuple[Plan, ...]
    refused: int
    too_large: int
    fitting: int


def candidates(config: Config, devices: int, device: Device) -> Iterator[Config]:
    """Configurations to try, allowed or not, none of them twice over."""
    own, sizes = config.parallel, [size for size in range(1, devices + 1) if devices % size == 0]
    tensors = [size for size in sizes if size <= device.per_node]
    contexts = [size for size in sizes if size == 1 or config.train.seq_length // size >= LEAST_PART]
    for tensor, pipeline, context in itertools.product(tensors, sizes, contexts):
        if devices % (tensor * pipeline * context) or pipeline > config.model.layers:
            continue
        schedules = [
            (name, virtual)
            for name, virtual in itertools.product(SCHEDULES, VIRTUAL_STAGES)
            if (pipeline > 1 or name == "1f1b") and SCHEDULES[name].refusal(pipeline, pipeline, virtual) is None
        ]
        levels = (0, 1, 2, 3) if devices // (tensor * pipeline) > 1 else (1,)  # context ranks are copies, too
        experts = [size for size in sizes if config.model.experts % size == 0] if config.model.experts else [1]
        keeps = (False, True) if own.keep_gathered and tensor > 1 else (False,)
        pairs = (False, True) if own.two_batch_overlap and pipeline == 1 else (False,)
        for schedule, virtual in schedules:
            for zero, micro, recompute, expert, kept, paired in itertools.product(
                levels, MICRO_BATCHES, RECOMPUTE, experts, keeps, pairs
            ):
                layout: dict[str, Any] = {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "context": context,
                    "sequence": tensor > 1,
                    "keep_gathered": kept,
                    "two_batch_overlap": paired,
                    "schedule": schedule,
                    "virtual_stages": virtual,
                    "zero": zero,
                    "expert": expert,
                }
                batches: dict[str, Any] = {"micro_batch_size": micro, "recompute": recompute}
                parallel = dataclasses.replace(config.parallel, **layout)
                yield dataclasses.replace(config, parallel=parallel, train=dataclasses.replace(config.train, **batches))


def _allowed(config: Config, devices: int) -> bool:
    try:
        check_combinations(config, devices)
    except UserError:
        return False
    return True


def search(
    config: Config,
    devices: int,
    device: Device,
    tokens: float | None = None,
    price_per_hour: float | None = None,
    count: int = 10,
) -> Ranking:
    """The `count` fastest layouts of `config` on `devices`; arguments as for `estimate`.

    Exact: layouts are timed in the order of a bound from below, until none that is left can be among the fastest.
    Raises UserError if no layout is allowed or none fits, with the least memory that any needs.
    """
    check_bounds(config)
    tokens = planned_tokens(config) if tokens is None else tokens
    price_per_hour = price_per_hour if price_per_hour is not None else device.price or None
    limit = device.memory or float("inf")
    reward_model = reward_model_of(config)
    tally: Counter[str] = Counter()
    fitting: list[tuple[float, int, Job, RankMemory]] = []
    smallest: RankMemory | None = None
    for number, candidate in enumerate(candidates(config, devices, device)):
        if not _allowed(candidate, devices):
            tally["refused"] += 1
            continue
        job = Job.of(candidate, devices, device, reward_model)
        needs = worst_rank(job)
        if smallest is None or needs.total < smallest.total:
            smallest = needs
        if needs.total > limit:
            tally["too large"] += 1
            continue
        fitting.append((least_step_seconds(job), number, job, needs))
    if smallest is None:
        check_combinations(config, devices)  # says what is wrong where it is not the layout
        raise UserError(f"no layout of this model is allowed on {devices} devices; try another number")
    if not fitting:
        raise UserError(
            f"no layout fits: the smallest needs {smallest.total / GIB:.1f} GiB on a device with {limit / GIB:.1f}; "
            "use more devices, larger ones, or a shorter train.seq_length"
        )
    plans: list[Plan] = []
    for least, _, job, needs in sorted(fitting, key=lambda entry: entry[:2]):
        if len(plans) >= count and least >= plans[count - 1].time.seconds:
            break
        plans.append(Plan(job, tokens, price_per_hour, needs, step_time(job)))
        plans.sort(key=lambda plan: plan.time.seconds)
    return Ranking(tuple(plans[:count]), tally["refused"], tally["too large"], len(fitting))
