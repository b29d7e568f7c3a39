"""Memory of a rank, by part, at its worst moment.

Parameters, optimizer and gradients follow from the placements; activations from walking the schedule's own operations:
each forward adds what its stage keeps, each backward takes it away, and the moment with most in flight (and the layer
that is being computed on top) counts. The optimizer's step is looked at as a moment of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megalite.parallel.zero import IN_FLIGHT
from megalite.planning.activations import stage_memory
from megalite.planning.architecture import vocabulary_rows
from megalite.planning.hardware import GIB
from megalite.planning.job import Job
from megalite.schedule.ops import Op

FRAGMENTATION = {"cuda": 0.05, "cpu": 0.02}
"""What torch's allocator (CPU: the C library's) reserves beyond the tensors, as a share of them."""

CONTEXT_BYTES = (0.8 * GIB, 1.6 * GIB)
"""CUDA context, cuBLAS workspace and kernels of one process alone, and with NCCL's buffers."""

STEADY = 6
"""Micro-batches for each pipeline rank after which every schedule but GPipe repeats itself."""

TRANSFER_BUFFERS = 4
"""Activations on their way: one received ahead in each direction, and two gradients still being sent."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes by part, of the worst of the ranks with this pipeline rank; `moment` is when, `micro_batches` in flight."""

    pipeline_rank: int
    parts: Mapping[str, float]
    moment: str
    in_flight: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def state_bytes(
    parameters: float, data: int, zero: int, *, weight: float = 2, gradient: float = 4, master: float = 4
) -> dict[str, float]:
    """Weights, master weights, AdamW's moments (fp32) and gradients of `parameters` elements on one of `data` ranks.

    The arguments are bytes for each element. ZeRO shares out the optimizer (1), then gradients (2), then weights (3):
    Rajbhandari et al. 2020, section 5.
    """
    return {
        "weights": parameters * weight / (data if zero >= 3 else 1),
        "master weights": parameters * master / (data if zero >= 1 else 1),
        "moments": parameters * 8 / (data if zero >= 1 else 1),
        "gradients": parameters * gradient / (data if zero >= 2 else 1),
    }


def stage_elements(job: Job, stage: int) -> int:
    """Elements of the parameters that a stage stores on one tensor rank, padded vocabulary rows included.

    An output layer that shares the embedding's storage counts with the first stage.
    """
    sizes = job.architecture.sizes(job.tensor)
    total = job.layers[stage] * job.layer.sizes.elements
    if stage == 0:
        total += sizes.embedding
    if stage == job.stages - 1:
        total += sizes.final + (0 if job.shares_vocabulary else sizes.output)
    return total


def rank_parameters(job: Job, rank: int) -> int:
    """The same of all stages of a pipeline rank."""
    return sum(stage_elements(job, stage) for stage in job.stages_of(rank))


def rank_states(job: Job, rank: int) -> dict[str, float]:
    """Memory held throughout a step: model states, parameters unsharded by ZeRO, tables."""
    parameters, stages = rank_parameters(job, rank), job.stages_of(rank)
    master = 0.0 if job.element_bytes == 4 else 4.0  # fp32 master weights are the weights
    zero = job.zero if job.data > 1 else 0
    parts = state_bytes(parameters, job.data, zero, weight=job.element_bytes, master=master)
    if zero == 1:
        parts["gradients"] += 4.0 * parameters / job.data  # the reduced shard has its own buffer
    whole = [_whole_buckets(job, stage) for stage in stages]
    if zero >= 2:
        parts["gradients"] += 4.0 * max((IN_FLIGHT + 1) * layer + ends for layer, ends in whole)
    if zero == 3:
        parts["weights"] += job.element_bytes * sum(layer + max(layer, ends) for layer, ends in whole)
    model = job.architecture.model
    ends = bool({0, job.stages - 1} & set(stages))
    if job.shares_vocabulary and ends:  # the output layer's own gradients, until both are added
        parts["gradients"] += 4.0 * vocabulary_rows(job.architecture, job.tensor) * model.hidden_size
    tables = 8.0 * model.max_positions * model.head_dim * len(stages)
    parts["tokens and tables"] = tables + 16.0 * job.tokens * job.micro_batches * ends
    return parts


def _whole_buckets(job: Job, stage: int) -> tuple[float, float]:
    """(layer, vocabulary) elements that ZeRO-2 and 3 have whole at a time; 0 for a stage without the latter."""
    vocabulary = vocabulary_rows(job.architecture, job.tensor) * job.architecture.model.hidden_size
    ends = vocabulary if stage in (0, job.stages - 1) else 0
    return float(job.layer.sizes.elements), float(ends)


class _Moment(NamedTuple):
    """An operation and what lives while it runs, bytes; `in_flight` counts (stage, micro-batch) pairs."""

    total: float
    kept: float
    working: float
    loss: float
    in_flight: int
    op: Op | None = None

    @property
    def name(self) -> str:
        if self.op is None:
            return "optimizer's step"
        kind = {"F": "forward", "W": "weight gradients"}.get(self.op.kind, "backward")
        return f"{kind} of stage {self.op.stage}, micro-batch {self.op.micro}"


def _worst_moment(job: Job, rank: int) -> _Moment:
    """Of all compute operations of the rank."""
    alike = {job.alike(stage): stage for stage in job.stages_of(rank)}
    known = {kind: stage_memory(job, stage) for kind, stage in alike.items()}
    stages = {stage: known[job.alike(stage)] for stage in job.stages_of(rank)}
    live, count, worst = 0.0, 0, _Moment(-1.0, 0.0, 0.0, 0.0, 0)
    for op in _operations(job, rank):
        memory = stages[op.stage]
        if op.kind == "F":
            live, count = live + memory.kept, count + 1
            working = max(memory.forward, memory.loss)
        else:
            working = memory.backward
        if live + working > worst.total:
            at_loss = op.kind == "F" and memory.loss >= memory.forward
            worst = _Moment(live + working, live, 0.0 if at_loss else working, working if at_loss else 0.0, count, op)
        if op.kind != "F":
            live -= {"B": memory.kept, "I": memory.kept - memory.postponed, "W": memory.postponed}[op.kind]
            count -= op.kind != "I"
    return worst


def _operations(job: Job, rank: int) -> tuple[Op, ...]:
    """The rank's operations, of fewer micro-batches where more change nothing: once backwards follow forwards."""
    few = STEADY * job.pipeline
    if job.micro_batches <= few:
        return job.plan()[rank]
    short = job.plan(few)[rank]
    kinds = [op.kind for op in short]
    filled = len(kinds) - kinds[::-1].index("F") < kinds.index("F") + kinds.count("F") + 1
    return job.plan()[rank] if filled else short


def rank_memory(job: Job, rank: int) -> RankMemory:
    """The worst moment of one pipeline rank."""
    parts = rank_states(job, rank)
    worst = _worst_moment(job, rank)
    transfers = 0.0
    if job.pipeline > 1:
        hidden = job.architecture.model.hidden_size / job.split
        transfers = TRANSFER_BUFFERS * job.tokens * job.element_bytes * hidden
    # The optimizer's step: activations are gone, the new parameters are being gathered.
    gather = job.element_bytes * rank_parameters(job, rank) / job.data if job.data > 1 and job.zero >= 1 else 0.0
    if gather > worst.total + transfers:
        worst, transfers = _Moment(gather, 0.0, gather, 0.0, 0), 0.0
    parts["activations"] = worst.kept
    parts["pipeline transfers"] = transfers
    parts["layer at work"] = worst.working
    parts["output layer"] = worst.loss
    kind = "cuda" if job.device.is_gpu else "cpu"
    parts["fragmentation"] = FRAGMENTATION[kind] * sum(parts.values())
    if job.device.is_gpu:
        parts["CUDA and NCCL"] = CONTEXT_BYTES[job.world > 1]
    return RankMemory(rank, parts, worst.name, worst.in_flight)


def worst_rank(job: Job) -> RankMemory:
    """The pipeline rank that needs most."""
    return max((rank_memory(job, rank) for rank in range(job.pipeline)), key=lambda memory: memory.total)
