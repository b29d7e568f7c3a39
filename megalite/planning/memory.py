"""Memory of a rank, by part, at its worst moment.

Parameters, optimizer and gradients follow from the placements; activations from walking the schedule's own operations:
each forward adds what its stage keeps, each backward takes it away, and the moment with most in flight (and the layer
that is being computed on top) counts. The optimizer's step is looked at as a moment of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megalite.planning.activations import stage_memory
from megalite.planning.alignment import bytes_beside, rollout_bytes
from megalite.planning.hardware import GIB
from megalite.planning.job import Job
from megalite.planning.muon_cost import muon_bytes
from megalite.planning.states import rank_shares, rank_states
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
    beside = bytes_beside(job, rank)
    found = _update_memory(job, rank, beside)
    if job.rollout is None:
        return found
    parts = rank_states(job, rank, working=False) | beside | rollout_bytes(job, rank)
    return max(found, RankMemory(rank, _with_overhead(job, parts), "rollout", 0), key=lambda memory: memory.total)


def _update_memory(job: Job, rank: int, beside: dict[str, float]) -> RankMemory:
    """The worst moment of the trained model's update; a critic's needs less, since it has no logits."""
    parts = rank_states(job, rank) | beside
    worst = _worst_moment(job, rank)
    transfers = 0.0
    if job.pipeline > 1:
        hidden = job.architecture.model.hidden_size / job.split
        transfers = TRANSFER_BUFFERS * job.tokens * job.element_bytes * hidden
    # The optimizer's step: activations are gone, matrices are orthogonalised or the new parameters being gathered.
    gather = 0.0
    if job.zero >= 1:
        gather = job.element_bytes * sum(
            own / ranks for own, ranks in rank_shares(job, rank, trained=True) if ranks > 1
        )
    after = max(gather, muon_bytes(job, rank))
    if after > worst.total + transfers:
        worst, transfers = _Moment(after, 0.0, after, 0.0, 0), 0.0
    parts["activations"] = worst.kept
    parts["pipeline transfers"] = transfers
    parts["layer at work"] = worst.working
    parts["output layer"] = worst.loss
    return RankMemory(rank, _with_overhead(job, parts), worst.name, worst.in_flight)


def _with_overhead(job: Job, parts: dict[str, float]) -> dict[str, float]:
    """The parts and what comes on top of all of them."""
    kind = "cuda" if job.device.is_gpu else "cpu"
    parts["fragmentation"] = FRAGMENTATION[kind] * sum(parts.values())
    if job.device.is_gpu:
        parts["CUDA and NCCL"] = CONTEXT_BYTES[job.world > 1]
    return parts


def worst_rank(job: Job) -> RankMemory:
    """The pipeline rank that needs most."""
    return max((rank_memory(job, rank) for rank in range(job.pipeline)), key=lambda memory: memory.total)
