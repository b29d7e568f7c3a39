"""Time of a step: what comes before its updates, the schedule's own simulation of an update, and what follows it.

Gradients are reduced under the last backwards, and the new parameters gathered under the next step's first forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.planning.alignment import critic_job, least_forward_seconds, parts_before_update
from megalite.planning.data_overlap import exposed_data
from megalite.planning.job import Job
from megalite.planning.muon_cost import muon_seconds
from megalite.planning.stage_time import (
    StageWork,
    TimeParts,
    makespan,
    pipeline_costs,
    stage_works,
)
from megalite.planning.states import rank_shares

STEP_OVERHEAD = 3e-3
"""Seconds per step for the all-reduce of norm and loss, the host's wait for it, and fetching data."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and their breakdown: means over the pipeline ranks.

    `bubble` is the share of the pipeline's time in which its ranks compute nothing, as the simulator and the report
    count it.
    """

    seconds: float
    parts: Mapping[str, float]
    bubble: float


def _optimizer(job: Job) -> float:
    """Seconds of the update on the first pipeline rank."""
    shares = rank_shares(job, 0, trained=True)
    elements = sum(own for own, _ in shares)
    updated = sum(own / (ranks if job.zero >= 1 else 1) for own, ranks in shares)
    # AdamW reads gradient, both moments and weights, writes all but the gradient; the norm reads once more; all
    # gradients are zeroed before the next step.
    moved = updated * (32 + job.element_bytes) + 4.0 * elements
    return moved / job.device.memory_bandwidth + muon_seconds(job, 0)


def _rank_works(job: Job, works: list[StageWork]) -> list[TimeParts]:
    """The work of each pipeline rank for one micro-batch."""
    return [
        functools.reduce(
            TimeParts.plus, (works[stage].forward.plus(works[stage].backward) for stage in job.stages_of(rank))
        )
        for rank in range(job.pipeline)
    ]


def _least_update_seconds(job: Job) -> float:
    works = stage_works(job)
    busiest = max(work.seconds for work in _rank_works(job, works))
    late = sum(exposed_data(job, works)) if job.pipeline == 1 else 0.0  # of one stage it needs no simulation
    return busiest * job.micro_batches + late + _optimizer(job) + STEP_OVERHEAD


def least_step_seconds(job: Job) -> float:
    """A bound from below on `step_time`, without simulation: the busiest rank never idle."""
    updates = job.rollout.updates if job.rollout is not None else 1
    least = updates * _least_update_seconds(job)
    if job.beside.critic:
        least += updates * _least_update_seconds(critic_job(job))
    return least + sum(parts_before_update(job, least_forward_seconds).values())


def _update_time(job: Job) -> StepTime:
    """One optimizer step of the trained model."""
    works = stage_works(job)
    span = makespan(job, job.plan, *pipeline_costs(job, works))
    work = functools.reduce(TimeParts.plus, _rank_works(job, works)).times(job.micro_batches / job.pipeline)
    late, optimizer = sum(exposed_data(job, works)), _optimizer(job)
    idle = max(0.0, span - work.seconds)
    parts = {
        "matrix products": work.products,
        "attention": work.attention,
        "element-wise": work.elementwise,
        "waiting for the host": work.launch,
        "tensor-parallel communication": work.tensor,
        "context-parallel communication": work.context,
        "pipeline idle and transfers": idle,
        "rows on their way to experts": work.experts,
        "data-parallel communication": work.data + late,
        "optimizer": optimizer,
        "agreement": STEP_OVERHEAD,
    }
    return StepTime(span + late + optimizer + STEP_OVERHEAD, parts, idle / span)


def step_time(job: Job) -> StepTime:
    """Predict one step: of the full global batch, or of all answers and the updates from them.

    The parts of the trained model's updates have the names of what is done; what comes before them, and a critic's
    updates, one name each.
    """
    updates = job.rollout.updates if job.rollout is not None else 1
    update = _update_time(job)
    parts = parts_before_update(job) | {name: updates * value for name, value in update.parts.items()}
    if job.beside.critic:
        parts["critic's updates"] = updates * _update_time(critic_job(job)).seconds
    further = sum(value for name, value in parts.items() if name not in update.parts)
    return StepTime(updates * update.seconds + further, parts, update.bubble)
