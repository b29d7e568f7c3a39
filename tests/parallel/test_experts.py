"""Sparse layers train the model that one process trains, in every layout: experts split or not, all kinds of routers.

All runs are on process groups that answer late and poison their buffers, unless named otherwise.
"""

import pytest

from megalite.schedule.schedules import SCHEDULES
from tests.support.parity import Case, Layout, assert_close, assert_same_bits, layouts, train, train_alone

SPARSE = {
    "model.experts": 6,
    "model.experts_per_token": 2,
    "model.expert_ffn_hidden_size": 12,
    "model.aux_loss": 0.02,
    "model.router_z_loss": 0.003,
}
"""Mixtral's kind, with both losses of the router."""

FINE = {
    "model.experts": 12,
    "model.experts_per_token": 3,
    "model.expert_ffn_hidden_size": 12,
    "model.shared_experts": 2,
    "model.dense_layers": (0,),
    "model.router": "sigmoid",
    "model.router_scale": 1.5,
    "model.router_groups": 4,
    "model.router_bias_rate": 0.02,
    "model.aux_loss": 0.02,
    "model.aux_loss_scope": "batch",
}
"""DeepSeek's kind: many small experts in groups, shared ones, balanced by a bias and by the load of the step before."""


def case_for(layout, fields, **options):
    """3 layers, or one more than the stages; 4 samples a step, or 6 for 3 ranks."""
    stages = layout.pipeline * SCHEDULES[layout.schedule].least_chunks
    samples = 6 if 3 in (layout.pipeline, layout.data) else 4
    return Case.of({**fields, "model.layers": max(3, stages + 1), "train.global_batch_size": samples}, **options)


def check(pool, fields, layout, **options):
    case = case_for(layout, fields, **options)
    ours, alone = train(pool, case, layout, chaos=True), train_alone(case)
    (assert_same_bits if layout.pure_pipeline else assert_close)(ours, alone)


def with_experts(limit):
    """Every layout of up to `limit` processes that splits experts over 2, 3 or all data ranks."""
    for layout in layouts(limit):
        for expert in range(2, layout.data + 1):
            if layout.data % expert == 0:
                yield Layout(**{**vars(layout), "expert": expert})


SPLIT = list(with_experts(4))
QUICK = [
    Layout(data=2, expert=2),
    Layout(data=2, expert=2, zero=3),
    Layout(tensor=2, sequence=True, data=2, expert=2),
    Layout(pipeline=2, schedule="zb_h1", data=2, expert=2),
]


def marked(chosen):
    return [pytest.param(one, id=one.name, marks=() if one in QUICK else pytest.mark.slow) for one in chosen]


@pytest.mark.parametrize("layout", marked(SPLIT))
def test_experts_on_ranks(pool, layout):
    """Every second layout with one kind of router, the others with the other."""
    check(pool, FINE if SPLIT.index(layout) % 2 else SPARSE, layout)
