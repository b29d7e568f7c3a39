"""What nothing hides of data parallelism: gathers under a step's first forwards, reductions under its last backwards.

On a GPU the operations of a group run one after the other, in the order of their starts, and a wait is for all before
it. So it matters what is started first and where a rank waits (`Practice.gathers_hide`, `Practice.reductions_end`).
What runs beside computing progresses at `HIDDEN_SHARE` of its rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megalite.parallel.zero import BUCKET_ELEMENTS
from megalite.planning.job import Job
from megalite.planning.stage_time import (
    StageWork,
    exposed,
    gather_parameters,
    pipeline_costs,
    reduce_gradients,
)
from megalite.planning.states import stage_shares
from megalite.planning.tensor_time import HIDDEN_SHARE
from megalite.schedule.ops import Op
from megalite.schedule.simulate import Event, completions


@dataclass
class _Rank:
    """When a rank's first forward of a stage ends, and what makes its last gradients; the rank's end with its waits."""

    forward: dict[int, float] = field(default_factory=dict)
    gradients: dict[int, Event] = field(default_factory=dict)
    end: float = 0.0


def _first_share(job: Job, stage: int) -> float:
    """Share of a stage's parameters in one bucket: the first has nothing to hide under, nor has the last."""
    elements = sum(own for own, _ in stage_shares(job, stage, trained=True))
    return min(1.0, BUCKET_ELEMENTS / max(1, elements))


def _short_run(job: Job, works: list[StageWork], pauses: Mapping[Op, float]) -> list[_Rank]:
    """The ranks in a step of few micro-batches: it begins and ends as a long one does."""
    ranks = [_Rank() for _ in range(job.pipeline)]
    costs, transfer = pipeline_costs(job, works)
    plan = job.plan(min(job.micro_batches, job.pipeline))
    for event in completions(plan, costs, transfer, pauses):
        own = ranks[event.rank]
        if event.op.kind == "F":
            own.forward.setdefault(event.op.stage, event.end)
        elif event.op.kind in "BW":
            own.gradients[event.op.stage] = event
        own.end = event.end + pauses.get(event.op, 0.0)
    return ranks


def _gathers(job: Job, ranks: list[_Rank]) -> float:
    """Seconds by which the first forwards wait for parameters, on the rank that waits longest."""
    late = 0.0
    for own in ranks:
        done = 0.0
        for stage in sorted(own.forward):  # in the order of the gathers
            whole = gather_parameters(job, stage, trained=True)
            first = 0.0 if done else whole * _first_share(job, stage)
            done += whole
            late = max(late, first, exposed(done, own.forward[stage]) if job.practice.gathers_hide else done)
    return late


def _unreduced(job: Job, works: list[StageWork], stage: int) -> float:
    """Seconds of a stage's reductions that its own last backward does not hide."""
    whole = reduce_gradients(job, stage)
    return max(whole * _first_share(job, stage), exposed(whole, works[stage].backward.seconds))


def _at_the_end(job: Job, own: _Rank) -> float:
    """Seconds for which a rank waits for all its reductions after its last operation."""
    late = left = 0.0
    for stage, event in sorted(own.gradients.items(), key=lambda item: -item[1].end):
        whole = reduce_gradients(job, stage)
        if not left:
            late = whole * _first_share(job, stage)
        left += whole  # this stage's and those of all that follow
        late = max(late, left - HIDDEN_SHARE * (own.end - event.start))
    return late


def exposed_data(job: Job, works: list[StageWork]) -> tuple[float, float]:
    """(seconds for which gathers, seconds for which reductions make a step longer) beyond its schedule.

    ZeRO-2's and 3's reductions and ZeRO-3's gathers take place for every micro-batch; they are part of `works`.
    """
    if job.replicas == 1:
        return 0.0, 0.0
    ranks = _short_run(job, works, {})
    gathers = _gathers(job, ranks) if job.zero in (1, 2) else 0.0
    if job.zero >= 2:
        return gathers, 0.0
    end = max(own.end for own in ranks)
    if job.practice.reductions_end:
        return gathers, max(own.end + _at_the_end(job, own) for own in ranks) - end
    pauses = {event.op: _unreduced(job, works, stage) for own in ranks for stage, event in own.gradients.items()}
    return gathers, max(own.end for own in _short_run(job, works, pauses)) - end
