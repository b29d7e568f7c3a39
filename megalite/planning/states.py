"""What a rank holds throughout a step: parameters, optimizer and gradients, by the placements and by ZeRO level."""

from __future__ import annotations

from megalite.parallel.zero import IN_FLIGHT
from megalite.planning.architecture import vocabulary_rows
from megalite.planning.job import Job


def state_bytes(
    parameters: float,
    data: int,
    zero: int,
    *,
    weight: float = 2,
    gradient: float = 4,
    master: float = 4,
    moments: float = 8,
) -> dict[str, float]:
    """Weights, master weights, the optimizer's moments (fp32) and gradients of `parameters` elements on one of `data`
    ranks.

    The arguments are bytes for each element; AdamW has two moments. ZeRO shares out the optimizer (1), then gradients
    (2), then weights (3): Rajbhandari et al. 2020, section 5.
    """
    return {
        "weights": parameters * weight / (data if zero >= 3 else 1),
        "master weights": parameters * master / (data if zero >= 1 else 1),
        "moments": parameters * moments / (data if zero >= 1 else 1),
        "gradients": parameters * gradient / (data if zero >= 2 else 1),
    }


def adapter_elements(job: Job, stage: int) -> int:
    """Elements that a stage trains on one tensor rank beside frozen weights: an adapter's, and a scalar head's."""
    total = sum(count * kind.layer.sizes.adapter_elements for kind, count in job.kinds(stage))
    return total + (job.architecture.model.hidden_size if stage == job.stages - 1 and job.head == "scalar" else 0)


def stage_elements(job: Job, stage: int) -> int:
    """Elements of the parameters that a stage stores on one tensor rank, padded vocabulary rows included.

    An output layer that shares the embedding's storage counts with the first stage.
    """
    sizes = job.architecture.sizes(job.tensor)
    sizes_of = [(kind.layer.sizes, count) for kind, count in job.kinds(stage)]
    total = sum(count * (layer.elements + layer.adapter_elements) for layer, count in sizes_of)
    if stage == 0:
        total += sizes.embedding
    if stage == job.stages - 1:
        head = job.architecture.model.hidden_size if job.head == "scalar" else sizes.output
        total += sizes.final + (0 if job.shares_vocabulary else head)
    return total


def stage_shares(job: Job, stage: int, *, trained: bool = False) -> tuple[tuple[int, int], ...]:
    """(elements, ranks that hold the same) of a stage: of all but the experts, and of the experts; of what is `trained`
    alone, if asked for."""
    if trained and job.architecture.frozen:
        return ((adapter_elements(job, stage), job.replicas),)
    experts = sum(count * kind.layer.expert_elements for kind, count in job.kinds(stage) if kind.layer.copies)
    return (stage_elements(job, stage) - experts, job.replicas), (experts, job.replicas // job.expert)


def rank_shares(job: Job, rank: int, *, trained: bool = False) -> tuple[tuple[int, int], ...]:
    """The same of all stages of a pipeline rank."""
    alike = zip(*(stage_shares(job, stage, trained=trained) for stage in job.stages_of(rank)))
    return tuple((sum(elements for elements, _ in shares), shares[0][1]) for shares in alike)


def rank_matrices(job: Job, rank: int) -> tuple[int, ...]:
    """Elements of the layers' matrices that are trained on a pipeline rank, in the order of `rank_shares`."""
    if job.architecture.frozen:
        return (0,)
    kinds = [pair for stage in job.stages_of(rank) for pair in job.kinds(stage)]
    experts = sum(count * kind.layer.expert_elements for kind, count in kinds if kind.layer.copies)
    return sum(count * kind.layer.sizes.matrix_elements for kind, count in kinds) - experts, experts


def rank_parameters(job: Job, rank: int) -> int:
    """Elements of the parameters of all stages of a pipeline rank."""
    return sum(elements for elements, _ in rank_shares(job, rank))


def rank_states(job: Job, rank: int, *, working: bool = True) -> dict[str, float]:
    """Memory held throughout a step: model states, tables, and while the model is `working` what ZeRO unshards."""
    stages = job.stages_of(rank)
    master = 0.0 if job.element_bytes == 4 else 4.0  # fp32 master weights are the weights
    parts: dict[str, float] = {}
    shares = rank_shares(job, rank, trained=True)
    for (elements, copies), matrices in zip(shares, rank_matrices(job, rank), strict=True):
        zero = job.zero if copies > 1 else 0
        moments = 8.0
        if job.optimizer == "muon" and elements:  # one momentum for matrices
            moments -= 4.0 * matrices / elements
        states = state_bytes(elements, copies, zero, weight=job.element_bytes, master=master, moments=moments)
        if zero == 1:
            states["gradients"] += 4.0 * elements / copies  # the reduced shard has its own buffer
        parts = {name: parts.get(name, 0.0) + size for name, size in states.items()}
    zero = job.zero if job.replicas > 1 else 0
    whole = [_whole_buckets(job, stage) for stage in stages]
    frozen = job.architecture.frozen
    if frozen:
        parts["weights"] = _held_weights(job, rank)
    if zero >= 2 and working:
        trained = [(float(job.layer.sizes.adapter_elements), 0.0)] if frozen else whole
        parts["gradients"] += 4.0 * max((IN_FLIGHT + 1) * layer + ends for layer, ends in trained)
    if zero == 3 and working:
        parts["weights"] += job.element_bytes * sum(layer + max(layer, ends) for layer, ends in whole)
    model = job.architecture.model
    ends = bool({0, job.stages - 1} & set(stages))
    if job.shares_vocabulary and ends and not frozen:  # the output layer's own gradients, until both are added
        parts["gradients"] += 4.0 * vocabulary_rows(job.architecture, job.tensor) * model.hidden_size
    read = job.seq_length * job.micro_batch_size  # every rank reads whole sequences
    if job.fp8:
        parts["fp8 weights"] = _fp8_weights(job, rank)
    parts["tokens and tables"] = _tables(job, rank) + 16.0 * read * job.micro_batches * ends
    return parts


def _tables(job: Job, rank: int) -> float:
    """Bytes of the rotary angles of all stages of a rank."""
    return 8.0 * job.architecture.model.max_positions * job.architecture.model.rotary_dim * len(job.stages_of(rank))


def frozen_bytes(job: Job, rank: int) -> float:
    """A model that is not trained: its weights, shared out by ZeRO-3 alone, and its tables."""
    return _held_weights(job, rank) + _tables(job, rank) + (_fp8_weights(job, rank) if job.fp8 else 0.0)


def _fp8_weights(job: Job, rank: int) -> float:
    """Bytes of the layers' matrices in 8 bits, once for each direction: of all layers between two updates, under ZeRO-3
    of the two that are whole. Experts stay in bf16, as do routers, which are small enough to be counted."""
    stages = [[(_fp8_elements(kind), count) for kind, count in job.kinds(stage)] for stage in job.stages_of(rank)]
    if job.zero == 3 and job.replicas > 1:
        return 2.0 * sum(2 * max(elements for elements, _ in stage) for stage in stages)
    return 2.0 * sum(elements * count for stage in stages for elements, count in stage)


def _fp8_elements(job: Job) -> int:
    return job.layer.sizes.matrix_elements - (job.layer.expert_elements if job.layer.copies else 0)


def _held_weights(job: Job, rank: int) -> float:
    """Bytes of a rank's weights, shared out by ZeRO-3 alone."""
    held = sum(elements / (copies if job.zero == 3 else 1) for elements, copies in rank_shares(job, rank))
    return job.element_bytes * held


def _whole_buckets(job: Job, stage: int) -> tuple[float, float]:
    """(layer, vocabulary) elements that ZeRO-2 and 3 have whole at a time; 0 for a stage without the latter."""
    vocabulary = vocabulary_rows(job.architecture, job.tensor) * job.architecture.model.hidden_size
    ends = vocabulary if stage == 0 or (stage == job.stages - 1 and job.head == "vocabulary") else 0
    return float(job.layer.sizes.elements + job.layer.sizes.adapter_elements), float(ends)
