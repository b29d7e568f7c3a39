"""Memory of a rank, by part, at its worst moment.

Parameters, optimizer and gradients follow from the placements; activations from walking the schedule's own operations:
each forward adds what its stage keeps, each backward takes it away, and the moment with most in flight (and the layer
that is being computed on top) counts. The optimizer's step is looked at as a moment of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megalite.planning.activations import StageMemory, stage_memory
from megalite.planning.architecture import layer_share, stage_parameters, vocabulary_rows
from megalite.planning.hardware import GIB
from megalite.planning.job import Job

BUCKET_ELEMENTS = 1 << 23
"""Elements of a gradient bucket (megalite.parallel.data)."""

FRAGMENTATION = {"cuda": 0.05, "cpu": 0.02}
"""What torch's allocator (CPU: the C library's) reserves beyond the tensors, as a share of them."""

CONTEXT_BYTES = (0.8 * GIB, 1.6 * GIB)
"""CUDA context, cuBLAS workspace and kernels of one process alone, and with NCCL's buffers."""

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


def rank_parameters(job: Job, rank: int) -> int:
    """Elements of the parameters that a pipeline rank's stages hold on one tensor rank."""
    return sum(stage_parameters(job.architecture, job.tensor, job.stages, stage) for stage in job.stages_of(rank))


def rank_states(job: Job, rank: int) -> dict[str, float]:
    """What the rank holds all the time: states, the gradient shards of ZeRO-1, what ZeRO has in flight, tables."""
    parameters = rank_parameters(job, rank)
    master = 0.0 if job.element_bytes == 4 else 4.0  # fp32 master weights are the weights
    parts = state_bytes(parameters, job.data, job.zero, weight=job.element_bytes, master=master)
    bucket = min(parameters, max(BUCKET_ELEMENTS, _largest_parameter(job, rank)))
    if job.data > 1 and job.zero == 1:
        parts["gradients"] += 4.0 * parameters / job.data  # the reduced shard has its own buffer
    elif job.data > 1 and job.zero >= 2:
        parts["gradients"] += 4.0 * bucket
    if job.data > 1 and job.zero == 3:
        layer = layer_share(job.architecture, job.tensor).parameters
        parts["weights"] += job.element_bytes * (2.0 * layer + _vocabulary(job, rank))
    model = job.architecture.model
    if model.tie_embeddings and job.stages == 1:
        parts["gradients"] += 4.0 * _vocabulary(job, rank)  # the output layer's own, until both are added
    ends = len({0, job.stages - 1} & set(job.stages_of(rank)))
    tables = 8.0 * model.max_positions * model.head_dim * len(job.stages_of(rank))
    parts["tokens and tables"] = tables + 16.0 * job.tokens * job.micro_batches * min(1, ends)
    return parts


def _vocabulary(job: Job, rank: int) -> float:
    ends = {0, job.stages - 1} & set(job.stages_of(rank))
    return float(vocabulary_rows(job.architecture, job.tensor) * job.architecture.model.hidden_size * bool(ends))


def _largest_parameter(job: Job, rank: int) -> int:
    return max(layer_share(job.architecture, job.tensor).largest_matrix, int(_vocabulary(job, rank)))


@dataclass(frozen=True)
class _Moment:
    name: str
    kept: float
    working: float
    loss: float
    in_flight: int

    @property
    def total(self) -> float:
        return self.kept + self.working + self.loss


def _moments(job: Job, rank: int) -> Iterator[_Moment]:
    """Every compute operation of the rank, with what lives while it runs."""
    stages = {stage: stage_memory(job, stage) for stage in job.stages_of(rank)}
    live, count = 0.0, 0
    split = {op.stage for op in job.plan()[rank] if op.kind == "W"}
    for op in job.plan()[rank]:
        memory: StageMemory = stages[op.stage]
        where = f"stage {op.stage}, micro-batch {op.micro}"
        if op.kind == "F":
            live, count = live + memory.kept, count + 1
            working, loss = (memory.forward, memory.loss) if memory.loss <= memory.forward else (0.0, memory.loss)
            yield _Moment(f"forward of {where}", live, working, loss, count)
        else:
            yield _Moment(f"backward of {where}", live, memory.backward, 0.0, count)
        if op.kind == "W" or (op.kind == "B" and op.stage not in split):
            live, count = live - memory.kept, count - 1


def rank_memory(job: Job, rank: int) -> RankMemory:
    """The worst moment of one pipeline rank."""
    parts = rank_states(job, rank)
    worst = max(_moments(job, rank), key=lambda moment: moment.total)
    transfers = 0.0
    if job.pipeline > 1:
        hidden = job.architecture.model.hidden_size / job.split
        transfers = TRANSFER_BUFFERS * job.tokens * job.element_bytes * hidden
    # The optimizer's step: activations are gone, the new parameters are being gathered.
    gather = job.element_bytes * rank_parameters(job, rank) / job.data if job.data > 1 and job.zero >= 1 else 0.0
    if gather > worst.total + transfers:
        worst, transfers = _Moment("the optimizer's step", 0.0, gather, 0.0, 0), 0.0
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
