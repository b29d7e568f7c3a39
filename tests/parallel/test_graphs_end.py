"""Nothing of a step's autograd graph outlives it: what a graph that is never freed holds, a run would heap up.

A function's context that reaches its own output (by way of a transfer that holds the buffer, for instance) is a cycle
through C++, which Python's collector does not see. An ordinary backward may break it; activation checkpointing, which
drops the graph of its second forward, does not.
"""

import gc

import pytest
from torch.autograd.function import FunctionCtx

from tests.parallel.test_experts import SPARSE
from tests.support.parity import Case, Layout, build_trainer, micro_batches

LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(data=2, zero=3),
    Layout(context=2, mode="gather"),
    Layout(context=2, mode="ring"),
    Layout(context=2, mode="ulysses"),
    Layout(data=2, expert=2),
]


def contexts():
    gc.collect()
    return sum(isinstance(each, FunctionCtx) for each in gc.get_objects())


def graphs_left(rank, case, world):
    """Contexts of autograd functions that are there after three steps and were not before."""
    config = case.config(world)
    trainer, before = build_trainer(config, rank, world), contexts()
    for step in range(3):
        trainer.step(micro_batches(4 * step, 4, config, trainer.mesh, case.documents), 1e-3)
    return contexts() - before


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_no_graph_outlives_its_step(pool, layout, recompute):
    fields = SPARSE if layout.expert > 1 else {}
    case = Case.of(fields | layout.fields | {"train.recompute": recompute}, documents=True)
    assert pool.run(graphs_left, layout.world, case, layout.world) == [0] * layout.world
