"""What layers, objectives and models of one's own may do, in every kind of layout: weights that are used twice, weights
that stay as they are, losses that are no sum of token losses, scalar heads, generation from weights in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.model.build import Build
from megalite.model.feed_forward import SwiGLU
from megalite.objective import Outputs
from megalite.objective.next_token import NextToken
from megalite.train.oom import held_bytes
from tests.support.parity import (
    Case,
    Layout,
    assert_close,
    assert_trains_as_alone,
    build_trainer,
    pieces_of_weights,
    train_alone,
)

LAYOUTS = [
    Layout(data=2, zero=0),
    Layout(data=2, zero=1),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(tensor=2, data=2, zero=3),
    Layout(pipeline=2, schedule="zb_h1", data=2, zero=2),
    Layout(pipeline=2, schedule="interleaved", data=2, zero=3),
    Layout(context=2, mode="ring", tensor=2, sequence=True),
]
in_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


class Twice(SwiGLU):
    """The same weights two times in a row, as layers that share them do."""

    def forward(self, x_sBH: Tensor, *, recompute: bool = False) -> Tensor:
        return super().forward(super().forward(x_sBH, recompute=recompute), recompute=recompute)


class HalfFrozen(SwiGLU):
    """Its second matrix is not trained."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        self.down.weight.requires_grad_(False)


class Focal:
    """Tokens count the more, the less likely they are: not a sum of token losses, and with a metric of its own."""

    reads = "logprobs"
    metrics = ("sureness",)

    def units(self, batch: Batch) -> Tensor:
        return (batch.labels_BS != IGNORE_INDEX).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.logprobs_BS is not None
        counts_BS, p_BS = batch.labels_BS != IGNORE_INDEX, outputs.logprobs_BS.exp()
        loss_BS = -((1 - p_BS) ** 2) * outputs.logprobs_BS
        sums = [(values_BS * counts_BS).sum(dtype=torch.float64) * scale for values_BS in (loss_BS, p_BS.detach())]
        return sums[0], {"sureness": sums[1]}


class LogLikelihood(Focal):
    """Next-token prediction written with log-probabilities."""

    metrics = ()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.logprobs_BS is not None
        return -outputs.logprobs_BS.sum(dtype=torch.float64) * scale, {}


class Regression(Focal):
    """A scalar head learns the token's number."""

    reads = "values"
    metrics = ()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.values_BS is not None
        counts_BS = batch.labels_BS != IGNORE_INDEX
        errors_BS = (outputs.values_BS - batch.tokens_BS / 37) * counts_BS
        return errors_BS.square().sum(dtype=torch.float64) * scale, {}


FOCAL, LOG_LIKELIHOOD, REGRESSION = Focal(), LogLikelihood(), Regression()


def case_of(fields: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """Four layers, so that they can be interleaved, and micro-batches for two data ranks."""
    return Case.of({"model.layers": 4, "train.global_batch_size": 8} | dict(fields or {}), **options)


@in_layouts
def test_a_weight_that_is_used_twice(layout):
    case = case_of({"model.feed_forward": f"{__name__}:Twice"}, steps=4)
    assert_trains_as_alone(case, layout)


def initial_weights(case: Case) -> dict[str, Tensor]:
    pieces = pieces_of_weights(build_trainer(case.config(1), 0, 1))
    return {piece.box.name: torch.from_numpy(piece.values) for piece in pieces}


@in_layouts
def test_a_frozen_weight_stays_and_has_no_gradient(layout):
    case = case_of({"model.feed_forward": f"{__name__}:HalfFrozen"}, steps=4)
    assert_trains_as_alone(case, layout)
    untouched = initial_weights(case)
    trained = train_alone(case)
    for name, weight in trained.weights.items():
        frozen = "down_proj" in name
        assert torch.equal(weight, untouched[name]) == frozen
        assert (name in trained.gradients) != frozen


@in_layouts
def test_an_objective_of_log_probabilities(layout):
    assert_trains_as_alone(case_of(steps=4, objective=FOCAL), layout)


@in_layouts
def test_a_scalar_head(layout):
    assert_trains_as_alone(case_of({"model.tie_embeddings": True}, steps=4, objective=REGRESSION), layout)


@pytest.mark.fast
def test_log_probabilities_give_the_gradients_of_the_loss_in_one_pass():
    one, other = train_alone(case_of(objective=LOG_LIKELIHOOD)), train_alone(case_of())
    assert_close(one, other)


def metrics_of(rank: int, world: int, case: Case) -> tuple[dict[str, float], float]:
    from tests.support.parity import micro_batches

    config = case.config(world)
    trainer = build_trainer(config, rank, world, objective=case.objective)
    result = trainer.step(micro_batches(0, 8, config, trainer.mesh, False), 1e-3)
    return result.metrics, result.units


def test_metrics_of_an_objective_are_sums_over_the_global_batch(pool):
    case = case_of(objective=FOCAL)
    metrics, units = metrics_of(0, 1, case)
    assert 0 < metrics["sureness"] < 1 and units > 20
    for layout in (Layout(tensor=2, pipeline=2, sequence=True), Layout(data=4, zero=3)):
        for theirs, count in pool.run(metrics_of, 4, 4, case.having(layout.fields)):
            assert theirs == pytest.approx(metrics, rel=1e-6) and count == units


@pytest.mark.fast
def test_a_batch_without_labels_changes_nothing():
    case = case_of()
    trainer = build_trainer(case.config(1), 0, 1)
    before = [parameter.clone() for stage in trainer.stages.values() for parameter in stage.parameters()]
    empty = torch.full((1, 12), IGNORE_INDEX)
    result = trainer.step([Batch(torch.zeros(1, 12, dtype=torch.int64), empty)] * 2, 1e-2)
    assert result.units == 0 and trainer.optimizer.step_count == 0
    after = [parameter for stage in trainer.stages.values() for parameter in stage.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after))


def bytes_held(rank: int, world: int, case: Case) -> tuple[dict[str, int], dict[str, int]]:
    trainer = build_trainer(case.config(world), rank, world)
    return held_bytes(trainer), held_bytes(trainer)


@pytest.mark.parametrize("zero", [2, 3])
def test_looking_at_memory_allocates_none(pool, zero):
    """The out-of-memory report must not itself ask for whole gradients."""
    for first, again in pool.run(bytes_held, 2, 2, case_of({"parallel.zero": zero})):
        assert first == again and first["gradients"] < first["optimizer"]


PROMPTS = [[5, 1, 7], [3], [30, 2, 2, 9, 14]]


def generate_while_training(rank: int, world: int, case: Case) -> list[Any]:
    """Tokens after two steps, then two steps more; the weights in training are those that speak."""
    from tests.support.parity import micro_batches

    config = case.config(world)
    trainer = build_trainer(config, rank, world)
    spoken = []
    for step in range(2):
        for _ in range(2):
            result = trainer.step(micro_batches(8 * step, 8, config, trainer.mesh, False), 1e-2)
        with trainer.generating() as stages:
            generator = Generator(stages, trainer.owners, trainer.mesh, config.model)
            completions = generator.run(PROMPTS, Sampling(temperature=1.0, seed=3), Limits(6))
        spoken.append([completion.new_ids for completion in completions])
    return [spoken, result.loss]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, Layout(pipeline=2, schedule="zb_v", tensor=2, sequence=True)], ids=lambda layout: layout.name
)
def test_generation_from_weights_in_training(pool, layout):
    case = case_of()
    spoken, loss = generate_while_training(0, 1, case)
    assert spoken[0] != spoken[1]
    for theirs, their_loss in pool.run(generate_while_training, layout.world, layout.world, case.having(layout.fields)):
        assert theirs == spoken and their_loss == pytest.approx(loss, rel=1e-5)


def scores(rank: int, world: int, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """A frozen copy's log-probabilities, and those of the model that it was copied from."""
    from megalite.model.sharded import ShardedModel
    from tests.support.parity import micro_batches

    config = case.config(world)
    trainer = build_trainer(config, rank, world)
    reference = ShardedModel(config, trainer.mesh, trainer.kernels, trained=False)
    assert all(segment.gradient is None and not segment.state for segment in reference.segments)
    reference.copy_from(trainer)
    batches = micro_batches(0, 4 * trainer.mesh.dp, config, trainer.mesh, False)
    same = trainer.score(batches), reference.score(batches)
    for one, other in zip(*same):
        assert torch.equal(one, other)
    trainer.step(batches, 1e-2)
    moved = [not torch.equal(one, other) for one, other in zip(trainer.score(batches), reference.score(batches))]
    assert any(moved) or trainer.last_stage is None
    return same[1], [batch.labels_BS for batch in batches]


@in_layouts
def test_a_frozen_reference_scores_as_the_model_it_was_copied_from(pool, layout):
    case = case_of()
    alone, labels = scores(0, 1, case)
    for score, label in zip(alone, labels):
        assert (score[0] <= 0).all() and (score[:, label == IGNORE_INDEX] == 0).all()
    for theirs, _ in pool.run(scores, layout.world, layout.world, case.having(layout.fields)):
        for score, mine in zip(theirs, alone if layout.data == 1 else ()):
            torch.testing.assert_close(score[0], mine[0], rtol=1e-5, atol=1e-5)


def test_next_token_is_what_a_trainer_minimises_unless_told_otherwise():
    assert isinstance(build_trainer(case_of().config(1), 0, 1).objective, NextToken)
