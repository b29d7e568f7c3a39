"""Sparse layers train the model that one process trains, in every layout: experts split or not, all kinds of routers.

All runs are on groups that answer late and poison their buffers, unless named otherwise.
"""

import pytest
import torch

from megalite.schedule.schedules import SCHEDULES
from tests.support.chaos import ChaosGroups
from tests.support.parity import (
    Case,
    Layout,
    assemble,
    assert_close,
    assert_same_bits,
    assert_trains_as_alone,
    build_trainer,
    distance,
    layouts,
    micro_batches,
    pieces_of_weights,
    train,
    train_alone,
    train_virtually,
)

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


def check(fields, layout, **options):
    assert_trains_as_alone(case_for(layout, fields, **options), layout)


def with_experts(limit):
    """Every layout of up to `limit` processes that splits experts over 2, 3 or all data ranks."""
    for layout in layouts(limit):
        for expert in range(2, layout.data + 1):
            if layout.data % expert == 0:
                yield Layout(**{**vars(layout), "expert": expert})


SPLIT = [
    *(layout for layout in with_experts(4) if layout.zero in (1, 3)),  # 0 and 2 take the same paths
    Layout(data=2, expert=2, zero=0),
    Layout(data=2, expert=2, zero=2),
    Layout(data=2, expert=2, context=2),
    Layout(data=2, expert=2, context=2, zero=3),
]
QUICK = [
    Layout(data=2, expert=2),
    Layout(data=2, expert=2, zero=3),
    Layout(tensor=2, sequence=True, data=2, expert=2),
    Layout(pipeline=2, schedule="zb_h1", data=2, expert=2),
]


WHOLE = [
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2, schedule="interleaved"),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(pipeline=3, schedule="zb_h1"),
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True, pipeline=2, schedule="zb_h1"),
    Layout(pipeline=2, data=2, zero=2),
    Layout(context=2),
    Layout(tensor=2, sequence=True, context=2, mode="ring"),
]
LONG = [WHOLE[0], WHOLE[2], WHOLE[4], *WHOLE[6:]]


def marked(chosen):
    return [pytest.param(one, id=one.name, marks=() if one in QUICK else pytest.mark.slow) for one in chosen]


@pytest.mark.parametrize("layout", marked(SPLIT))
def test_experts_on_ranks(layout):
    """Every second layout with one kind of router, the others with the other."""
    check(FINE if SPLIT.index(layout) % 2 else SPARSE, layout)


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        pytest.param(layout, fields, id=f"{name}-{layout.name}", marks=[pytest.mark.slow] if layout in LONG else [])
        for name, fields in (("mixtral", SPARSE), ("deepseek", FINE))
        for layout in WHOLE
    ],
)
def test_experts_that_every_data_rank_holds(layout, fields):
    check(fields, layout)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, sequence=True, data=2, expert=2)], ids=lambda one: one.name
)
def test_recomputing_counts_nothing_twice(recompute, layout):
    """Layers are computed again in backward: loads, biases and losses of the router stay what they were, to the bit."""
    case = case_for(layout, FINE, steps=4)
    again = case.having({"train.recompute": recompute})
    if layout.world == 1:
        assert_same_bits(train_alone(again), train_alone(case))
    else:
        assert_same_bits(train_virtually(again, layout, chaos=True), train_virtually(case, layout, chaos=True))


ACCUMULATIONS = {
    "4 micro-batches": (Layout(), {}),
    "1 micro-batch": (Layout(), {"train.micro_batch_size": 4}),
    "2 data ranks": (Layout(data=2), {}),
    "2 tensor ranks": (Layout(tensor=2), {}),
    "2 sequence parts": (Layout(tensor=2, sequence=True), {}),
    "2 expert ranks": (Layout(data=2, expert=2), {}),
    "2 context ranks": (Layout(context=2), {}),
}


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_router_losses_do_not_depend_on_accumulation_or_layout(pool, scope):
    """With weights so large that a wrong scale shows in every number."""
    fields = {**SPARSE, "model.aux_loss": 2.0, "model.aux_loss_scope": scope, "model.router_z_loss": 0.5}
    case = Case.of(fields, steps=3)
    alone = train_alone(case)
    assert alone.metrics[0]["aux_loss"] > 2
    for layout, changes in ACCUMULATIONS.values():
        assert_close(train(pool, case.having(changes), layout), alone)


@pytest.mark.parametrize("field", ["model.aux_loss", "model.router_z_loss"])
def test_router_losses_reach_the_router(field):
    """The coefficient is used, and its gradient flows: proportional to it, in the router and below."""
    plain, one, two = (
        train_alone(Case.of({**SPARSE, "model.aux_loss": 0.0, "model.router_z_loss": 0.0, field: weight}, steps=1))
        for weight in (0.0, 0.5, 1.0)
    )
    for name in ("model.layers.2.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight"):
        once = one.gradients[name] - plain.gradients[name]
        assert once.norm() > 1e-3 * plain.gradients[name].norm(), name
        assert (two.gradients[name] - plain.gradients[name] - 2 * once).norm() < 1e-3 * once.norm(), name
    assert two.metrics[0]["aux_loss"] == pytest.approx(2 * one.metrics[0]["aux_loss"], rel=1e-6)
    assert plain.metrics[0]["aux_loss"] == 0
    assert plain.losses == one.losses


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2),
        Layout(tensor=2, sequence=True),
        Layout(data=2),
        Layout(data=2, expert=2, zero=3),
        Layout(pipeline=2),
    ],
    ids=lambda one: one.name,
)
def test_a_step_moves_each_bias_by_the_rate_once(pool, layout):
    """Not once for each rank or micro-batch, and not at all for an even load."""
    rate = 0.03125
    case = case_for(layout, {**FINE, "model.router_bias_rate": rate}, steps=1)
    biases = {
        name: bias for name, bias in train(pool, case, layout).weights.items() if name.endswith("correction_bias")
    }
    assert len(biases) == case.config(layout.world).model.layers - 1
    for bias in biases.values():
        assert set(bias.tolist()) <= {-rate, 0.0, rate}
        assert len(set(bias.tolist())) > 1


def lopsided(rank, layout):
    """Three steps in which every token chooses the first experts: the weights, and the numbers all ranks share."""
    fields = {"model.experts": 4, "model.router": "sigmoid", "model.router_bias_rate": 1e-6}
    config = Case.of({**fields, **layout.fields}).config(layout.world)
    groups = ChaosGroups(seed=rank)
    trainer = build_trainer(config, rank, layout.world, groups)
    for router in trainer.balance.routers:
        router.bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    numbers = []
    for step in range(3):
        result = trainer.step(micro_batches(4 * step, 4, config, trainer.mesh, False), 1e-2)
        numbers.append((result.loss, result.grad_norm, result.metrics["expert_load_max"]))
    pieces = pieces_of_weights(trainer)
    groups.verify()
    return numbers, pieces


@pytest.mark.parametrize(
    "layout", [Layout(data=2, expert=2), Layout(data=2, expert=2, zero=3)], ids=lambda one: one.name
)
def test_ranks_whose_experts_get_no_token_take_part(pool, layout):
    """No hang, no NaN, no stale gradient: the second rank's experts keep the weights that weight decay leaves them."""
    ranks = pool.run(lopsided, 2, layout)
    numbers, alone = lopsided(0, Layout())
    assert ranks[0][0] == ranks[1][0]
    for ours, theirs in zip(ranks[0][0], numbers):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert ours[2] == 2.0
    weights, expected = assemble([pieces for _, pieces in ranks], 2, 1), assemble([alone], 1, 1)
    far = {name: gap for name in expected if not (gap := distance(weights[name], expected[name])) < 1e-5}
    assert not far
