"""What Muon adds to AdamW's step: matrices that travel to one rank each, are orthogonalised there, and return."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megalite.config import ModelConfig
from megalite.model.cost import layer_matrices
from megalite.model.partition import layers_of_stage
from megalite.optim.muon import newton_schulz_flops
from megalite.optim.whole_matrices import share_out
from megalite.planning.hardware import exchange_seconds
from megalite.planning.job import Job
from megalite.planning.stage_time import exposed, product_seconds
from megalite.planning.states import rank_matrices

BYTES = 68.0
"""Moved for each element of a matrix in fp32, where AdamW moves 32: the gradient is scaled, the momentum and then the
gradient averaged, the update sent and taken back, weights decayed and updated; the norm reads once more."""

PASSES = 3
"""Further bytes, times those of an element: sent, taken back, rounded into the parameters."""

HELD = (7.0, 4.0)
"""What lives at once while matrices are orthogonalised: buffers of the exchanges, in units of a round, and tensors of
one matrix's size."""


@dataclass(frozen=True)
class _Shared:
    """How the matrices of one kind on one pipeline rank are shared out: the shapes that the busiest rank works on, the
    number of rounds, and the most elements that a rank works on in a round."""

    busiest: tuple[tuple[int, ...], ...]
    rounds: int
    most: int


@functools.lru_cache(maxsize=512)
def _shared(model: ModelConfig, layers: tuple[int, ...], ranks: int, expert: int, experts: bool) -> _Shared:
    """Of the experts (one of `expert` shares of them), or of all other matrices, over `ranks` ranks."""
    shapes = {
        f"{layer} {name}": shape
        for layer in layers
        for name, shape in layer_matrices(model, _alike(model, layer))
        if (".experts." in name) == experts
    }
    shapes = dict(list(shapes.items())[:: expert if experts else 1])
    plan = share_out(shapes, ranks, lambda shape: newton_schulz_flops(shape, 1))
    loads: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    for names in plan:
        for rank, mine in enumerate(names):
            loads[rank] += [shapes[name] for name in mine]
    busiest = max(loads, key=lambda load: sum(newton_schulz_flops(shape, 1) for shape in load))
    most = max((sum(shapes[name][0] * shapes[name][1] for name in mine) for names in plan for mine in names), default=0)
    return _Shared(tuple(busiest), len(plan), most)


def _alike(model: ModelConfig, layer: int) -> int:
    """The first layer of the same kind."""
    return next(other for other in range(model.layers) if model.is_sparse(other) == model.is_sparse(layer))


def _kinds(job: Job, rank: int) -> list[tuple[_Shared, int, int]]:
    """(how they are shared out, elements on a rank before ZeRO, ranks that share them) of matrices and of experts."""
    model = job.architecture.model
    layers = tuple(layer for stage in job.stages_of(rank) for layer in layers_of_stage(model, job.stages, stage))
    found = []
    for experts, elements in enumerate(rank_matrices(job, rank)):
        if elements:
            split = job.expert if experts else 1
            ranks = job.replicas // split * job.tensor
            found.append((_shared(model, layers, ranks, split, bool(experts)), elements, ranks))
    return found


def _matrix_seconds(job: Job, shape: tuple[int, ...]) -> float:
    small, large = sorted(shape)
    products = ((small, large, small), (small, small, small), (small, small, large))
    return job.newton_schulz_steps * sum(product_seconds(job, *sizes) for sizes in products)


def muon_seconds(job: Job, rank: int) -> float:
    """Seconds that a step of Muon takes longer than one of AdamW on a pipeline rank; 0 for other optimizers."""
    if job.optimizer != "muon":
        return 0.0
    total = 0.0
    for shared, elements, ranks in _kinds(job, rank):
        copies = ranks // job.tensor
        work = sum(_matrix_seconds(job, shape) for shape in shared.busiest)
        sent = [elements / copies, elements / (copies if job.zero else 1)]  # without ZeRO all come back to all
        moved = sum(exchange_seconds(job.element_bytes * own, ranks, job.device, 1) for own in sent)
        updated = elements / (copies if job.zero else 1)
        passes = updated * (BYTES + PASSES * job.element_bytes - 32.0 - job.element_bytes) / job.device.memory_bandwidth
        total += passes + work + exposed(moved, work) + moved / max(1, shared.rounds)
    return total


def muon_bytes(job: Job, rank: int) -> float:
    """Memory of the exchanges and of the matrix at work; 0 for other optimizers."""
    if job.optimizer != "muon":
        return 0.0
    most = 0.0
    for shared, _, _ in _kinds(job, rank):
        matrix = max(rows * columns for rows, columns in shared.busiest)
        gram = max(min(shape) ** 2 for shape in shared.busiest)
        most = max(most, HELD[0] * max(shared.most, matrix) + HELD[1] * matrix + 2.0 * gram)
    return job.element_bytes * most
