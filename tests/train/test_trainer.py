"""The step: refused by all ranks together, clipped by the norm of the whole, normalised once."""

import math

import pytest
import torch

from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.mesh import create_group
from tests.support.chaos import ChaosGroups
from tests.support.parity import Case, Layout, build_trainer, micro_batches, pieces_of_weights, train_alone

pytestmark = pytest.mark.fast

CASE = Case.of({"train.global_batch_size": 12})
LAYOUTS = [
    Layout(),
    Layout(data=2),
    Layout(data=2, zero=0),
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(pipeline=2, data=2),
]


def trainer_of(rank, case, layout, chaos=True):
    config = case.having(layout.fields).config(layout.world)
    groups = ChaosGroups(seed=rank)
    return build_trainer(config, rank, layout.world, groups if chaos else create_group), config, groups


def batches_of(trainer, config, first=0, samples=12):
    made = micro_batches(first, samples, config, trainer.mesh, False)
    return made if trainer.needs_batches else [None] * len(made)


def state_of(trainer):
    moments = [
        tensor.clone()
        for segment in trainer.optimizer.segments
        for tensor in (segment.state["exp_avg"], segment.state["exp_avg_sq"])
    ]
    return [torch.from_numpy(piece.values) for piece in pieces_of_weights(trainer)], moments


def same(one, other):
    return all(torch.equal(a, b) for ours, theirs in zip(one, other) for a, b in zip(ours, theirs))


def refuse(rank, case, layout, guilty, how):
    """A good step, a bad one, the good one again; against two good ones."""
    trainer, config, groups = trainer_of(rank, case, layout)
    pristine, _, _ = trainer_of(rank, case, layout, chaos=False)
    for one in (trainer, pristine):
        assert one.step(batches_of(one, config), 1e-2).accepted
    before = state_of(trainer)
    bad = batches_of(trainer, config, 12)
    spoiled = []
    if rank == guilty and how == "label":
        batch = bad[-1]
        batch.labels_BS[0, 3] = config.model.vocab_size
    elif rank == guilty:
        parameter = next(p for stage in trainer.stages.values() for p in stage.parameters() if p.dim() > 1)

        def spoil():
            if not spoiled:
                parameter.main_grad[1, 2] = math.nan if how == "nan" else math.inf
                spoiled.append(True)

        bucket, report = parameter.store, parameter.store.gradient_added
        bucket.gradient_added = lambda which: (which is parameter and spoil(), report(which))
    result = trainer.step(bad, 1e-2, flag=float(rank))
    unchanged = same(before, state_of(trainer)) and trainer.optimizer.step_count == 1
    after = [one.step(batches_of(one, config, 24), 1e-2) for one in (trainer, pristine)]
    trainer.wait_for_all_gather()
    groups.verify()
    equal = same(state_of(trainer), state_of(pristine)) and after[0] == after[1]
    return result.accepted, result.flags, unchanged, equal


@pytest.mark.parametrize("how", ["nan", "inf", "label"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_is_not_finite_on_one_rank_is_refused_by_all(pool, layout, how):
    """Nothing is left of the step: the next one gives the bits of a run that never saw it."""
    guilty = layout.world - 1
    results = pool.run(refuse, layout.world, CASE, layout, guilty, how)
    assert results == [(False, float(sum(range(layout.world))), True, True)] * layout.world


def clip(rank, case, layout, limit):
    trainer, config, _ = trainer_of(rank, case.having({"optimizer.clip_grad": limit}), layout)
    trainer.accumulate(batches_of(trainer, config))
    before = [segment.gradient.clone() for segment in trainer.optimizer.segments]
    result = trainer.step(batches_of(trainer, config), 0.0)
    ratios = [
        (segment.gradient.norm() / raw.norm()).item()
        for segment, raw in zip(trainer.optimizer.segments, before)
        if raw.norm() > 0
    ]
    return result.grad_norm, ratios


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_clipping_by_the_norm_of_the_whole(pool, layout):
    """All gradients shrink by limit / norm where the norm exceeds the limit, and by nothing otherwise."""
    norm = train_alone(CASE).grad_norms[0]
    for limit, factor in ((norm / 3, 1 / 3), (norm * 2, 1.0), (0.0, 1.0)):
        for grad_norm, ratios in pool.run(clip, layout.world, CASE, layout, limit):
            assert grad_norm == pytest.approx(norm, rel=1e-5)
            assert ratios == pytest.approx([factor] * len(ratios), rel=1e-4)


def ignore_all(rank, case, layout):
    trainer, config, _ = trainer_of(rank, case, layout)
    batches = batches_of(trainer, config)
    for batch in batches:
        if batch is not None:
            batch.labels_BS.fill_(IGNORE_INDEX)
    loss, tokens = trainer.evaluate(batches)
    result = trainer.step(batches, 1e-2)
    return result.loss, result.grad_norm, result.accepted, loss, tokens


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]], ids=lambda layout: layout.name)
def test_a_step_without_any_label(pool, layout):
    """No token counts: loss and gradient are 0, not 0/0."""
    assert pool.run(ignore_all, layout.world, CASE, layout) == [(0.0, 0.0, True, 0.0, 0)] * layout.world


def evaluate(rank, case, layout):
    trainer, config, _ = trainer_of(rank, case, layout)
    batches = batches_of(trainer, config)
    before = state_of(trainer)
    loss, tokens = trainer.evaluate(batches)
    assert same(before, state_of(trainer))
    return loss / tokens, tokens, trainer.step(batches, 1e-2).loss


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_evaluation_is_the_loss_of_the_step(pool, layout):
    config = CASE.config(1)
    labels = torch.cat(
        [batch.labels_BS for batch in micro_batches(0, 12, config, build_trainer(config, 0, 1).mesh, False)]
    )
    for mean, tokens, loss in pool.run(evaluate, layout.world, CASE, layout):
        assert tokens == int((labels != IGNORE_INDEX).sum())
        assert mean == pytest.approx(loss, rel=1e-6)
