"""The engine: any schedule, late and poisoned messages, gives the product of the stages and its gradients.

The stages here are y = tanh(x * w) over hidden [S, B, H], small enough to be followed by eye.
"""

import pytest
import torch
from torch import nn

from megalite.mesh import Mesh
from megalite.parallel.engine import Activation, PipelineEngine
from megalite.parallel.zero import StageBuckets
from megalite.placement import PlacedParameter, Placement, row_box
from megalite.schedule.lowering import lower
from megalite.schedule.schedules import build_schedule, forward_only, place_stages
from tests.support.chaos import ChaosGroups

pytestmark = pytest.mark.fast

SHAPE = (3, 2, 5)


def weight(stage):
    return torch.randn(5, generator=torch.Generator().manual_seed(stage)) + 1


def source(micro):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + micro))


class Toy(nn.Module):
    def __init__(self, stage, rank):
        super().__init__()
        box = row_box(f"w{stage}", (5,), 0, 5, 0, (rank,))
        self.weight = PlacedParameter(weight(stage), Placement((box,)))


def toy_forward(modules, stages):
    def forward(stage, micro, hidden):
        hidden = source(micro) if hidden is None else hidden
        hidden = torch.tanh(hidden * modules[stage].weight)
        return hidden.double().square().sum() if stage == stages - 1 else hidden

    return forward


def run_toy(rank, ranks, name, micros, chunks):
    groups = ChaosGroups(seed=rank)
    mesh = Mesh(pp=ranks, rank=rank, make_group=groups)
    owners = place_stages(name, ranks, chunks)
    stages, mine = len(owners), [stage for stage, owner in enumerate(owners) if owner == rank]
    modules = {stage: Toy(stage, rank) for stage in mine}
    buckets = {stage: StageBuckets(module, mesh, zero=1) for stage, module in modules.items()}
    plan = build_schedule(name, ranks, micros, chunks)
    activation = Activation(SHAPE, torch.float32, mesh.device)
    engine = PipelineEngine(lower(plan)[rank], owners, mesh, activation)
    forward = toy_forward(modules, stages)
    live = []

    def watched(stage, micro, hidden):
        live.append(len(engine._edges) + 1)
        return forward(stage, micro, hidden)

    for _ in range(2):
        for bucket in buckets.values():
            bucket.begin(micros)
        losses = engine.run(watched, buckets)
        groups.verify()
        kept = (engine._inputs, engine._gradients, engine._outputs, engine._edges)
        assert not any(kept) and not engine._sending, "something was left behind"
    with torch.no_grad():
        checker = PipelineEngine(lower(forward_only(owners, micros))[rank], owners, mesh, activation)
        again = checker.run(forward)
    groups.verify()
    return losses, again, {stage: module.weight.main_grad.clone() for stage, module in modules.items()}, max(live)


def alone(stages, micros):
    modules = {stage: Toy(stage, 0) for stage in range(stages)}
    forward, losses = toy_forward(modules, stages), {}
    total = {stage: torch.zeros(5) for stage in modules}
    for micro in range(micros):
        hidden = None
        for stage in range(stages):
            hidden = forward(stage, micro, hidden)
        losses[micro] = hidden.detach()
        for stage, slope in zip(total, torch.autograd.grad(hidden, [module.weight for module in modules.values()])):
            total[stage] += slope
    return losses, total


@pytest.mark.parametrize(
    ("name", "ranks", "micros", "chunks"),
    [
        ("gpipe", 1, 3, 1),
        ("gpipe", 3, 5, 1),
        ("1f1b", 1, 3, 1),
        ("1f1b", 2, 1, 1),
        ("1f1b", 3, 7, 1),
        ("1f1b", 4, 2, 1),
        ("interleaved", 2, 4, 2),
        ("interleaved", 3, 6, 3),
        ("interleaved", 4, 4, 2),
        ("zb_h1", 3, 5, 1),
        ("zb_h1", 4, 2, 1),
        ("zb_v", 2, 3, 2),
        ("zb_v", 4, 6, 2),
    ],
)
def test_every_schedule_computes_the_same_bits(pool, name, ranks, micros, chunks):
    results = pool.run(run_toy, ranks, ranks, name, micros, chunks)
    losses, gradients = alone(ranks * chunks, micros)
    for rank, (ours, again, slopes, live) in enumerate(results):
        assert ours == again == (losses if rank == place_stages(name, ranks, chunks)[-1] else {})
        for stage, slope in slopes.items():
            assert torch.equal(slope, gradients[stage]), stage
        if name == "1f1b":
            assert live == min(micros, ranks - rank)  # the memory that 1F1B is for


def wrong_shape(rank, dtype, shape):
    mesh = Mesh(pp=2, rank=rank)
    plan = lower(build_schedule("1f1b", 2, 1))
    engine = PipelineEngine(plan[rank], range(2), mesh, Activation(SHAPE, torch.float32, mesh.device))
    if rank == 0:
        with pytest.raises(ValueError, match=r"0SF0: .* does not match"):
            engine.run(lambda stage, micro, hidden: torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float64, SHAPE), (torch.float32, (3, 2, 4))])
def test_another_activation_than_announced_is_refused(pool, dtype, shape):
    pool.run(wrong_shape, 2, dtype, shape)
