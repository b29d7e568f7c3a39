"""Context parallelism trains the model that one process trains: every way of attention, in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config.lengths import padded_length
from megalite.data.batch import Batch
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.mesh import Group
from megalite.parallel.context import PADDING, ContextRegion
from megalite.schedule.schedules import SCHEDULES
from tests.parallel.test_seams import FOCAL
from tests.support.chaos import ChaosGroups
from tests.support.parity import (
    EVERYTHING,
    Case,
    Layout,
    assert_close,
    build_trainer,
    combine,
    micro_batches,
    pieces_of_gradients,
    pieces_of_weights,
    train,
    train_alone,
    train_virtually,
)
from tests.support.pool import Pool

MODES = ["gather", "ring", "ulysses"]
ODD = 11
"""Tokens of a sequence: no multiple of 2 * context, so that the last rows of it are padding."""


def case_for(layout: Layout, fields: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """3 layers, or one more than the stages; 11 tokens; 12 query heads that read 3 key/value heads."""
    stages = layout.pipeline * SCHEDULES[layout.schedule].least_chunks
    return Case.of({"train.seq_length": ODD, **(fields or {}), "model.layers": max(3, stages + 1)}, **options)


REPRESENTATIVE = [
    Layout(context=2),
    Layout(context=2, tensor=2, sequence=True),
    Layout(context=2, data=2, zero=3),
    Layout(context=2, pipeline=2, schedule="zb_h1"),
]
OTHERS = [
    Layout(context=3),
    Layout(context=4),
    Layout(context=2, data=2),
    Layout(context=2, zero=0),
    Layout(context=2, zero=2),
    Layout(context=2, tensor=2),
    *(Layout(context=2, pipeline=2, schedule=schedule) for schedule in SCHEDULES if schedule != "zb_h1"),
]


def marked(layouts: list[Layout], *marks: pytest.MarkDecorator) -> list[Any]:
    made = [dataclasses.replace(layout, mode=mode) for layout in layouts for mode in MODES]
    return [pytest.param(layout, id=layout.name, marks=marks) for layout in made]


@pytest.mark.parametrize("layout", [*marked(REPRESENTATIVE), *marked(OTHERS, pytest.mark.slow)])
def test_a_layout_trains_what_one_process_trains(layout: Layout) -> None:
    """Documents anywhere, a window across the cut, tied embeddings, norms of heads; on groups that misbehave."""
    case = case_for(layout, EVERYTHING, documents=True)
    assert_close(train_virtually(case, layout, chaos=True), train_alone(case))


@pytest.mark.fast
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_what_one_process_trains(pool: Pool, mode: str) -> None:
    layout = Layout(context=2, mode=mode)
    case = case_for(layout, steps=3)
    assert_close(train(pool, case, layout), train_alone(case))


@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_recomputation_communicates_again(mode: str, recompute: str) -> None:
    layout = Layout(context=2, pipeline=2, mode=mode)
    case = case_for(layout, {"train.recompute": recompute}, steps=3, documents=True)
    assert_close(train_virtually(case, layout, chaos=True), train_alone(case.having({"train.recompute": "none"})))


def few_labels(kept: Mapping[int, list[int]], config: Any, mesh: Any) -> list[Batch]:
    """This rank's micro-batches of the first four samples, with labels at the `kept` places of each alone."""
    batches = micro_batches(0, 4, config, mesh, False)
    first = mesh.index("dp")
    made = []
    for number, batch in zip(range(first, 4, mesh.dp), batches, strict=True):
        places = torch.tensor(kept.get(number, []), dtype=torch.int64)
        labels_BS = torch.full_like(batch.labels_BS, IGNORE_INDEX)
        labels_BS[:, places] = batch.tokens_BS[:, places]
        made.append(dataclasses.replace(batch, labels_BS=labels_BS))
    return made


def step_on(rank: int, world: int, case: Case, kept: Mapping[int, list[int]], chaos: bool) -> Any:
    """One step: the gradients that it makes, and everything that ranks must agree on."""
    from tests.support.parity import RankOutcome

    config, groups = case.config(world), ChaosGroups(seed=rank + 1)
    trainer = build_trainer(config, rank, world, *([groups] if chaos else []), objective=case.objective)
    batches = few_labels(kept, config, trainer.mesh)
    trainer.accumulate(batches)
    gradients = pieces_of_gradients(trainer)
    result = trainer.step(batches, 1e-2)
    assert result.accepted
    evaluation = trainer.evaluate(batches)
    pieces = {"gradients": gradients, "weights": pieces_of_weights(trainer)}
    outcome = RankOutcome([result.loss], [result.grad_norm], evaluation, **pieces)
    return outcome, result.units, result.metrics


@pytest.mark.parametrize("objective", [None, FOCAL], ids=["fused_loss", "log_probabilities"])
@pytest.mark.parametrize(
    "kept", [{1: [0]}, {0: [ODD - 1]}, {2: [2, 3], 3: [8]}], ids=["the_first", "the_last", "three_of_44"]
)
def test_a_loss_is_divided_by_the_count_of_all_ranks(pool: Pool, objective: Any, kept: dict[int, list[int]]) -> None:
    """One valid token in all: a division by a rank's own count gives half the gradient, or NaN where it is 0."""
    case = case_for(Layout(), objective=objective)
    mine, units, metrics = step_on(0, 1, case, kept, False)
    assert units == sum(map(len, kept.values()))
    alone = combine([mine], Layout())
    for layout in (
        Layout(context=2),
        Layout(context=2, data=2, zero=2, mode="ring"),
        Layout(context=4, mode="ulysses"),
    ):
        ranks = pool.run(step_on, layout.world, layout.world, case.having(layout.fields), kept, True)
        assert_close(combine([outcome for outcome, _, _ in ranks], layout), alone)
        for _, count, sums in ranks:
            assert count == units and sums == pytest.approx(metrics, rel=1e-6)


def region_of(ranks: int, index: int, split: int = 1) -> ContextRegion:
    return ContextRegion(Group(tuple(range(ranks)), index, None), split=split)


@pytest.mark.fast
@pytest.mark.parametrize(("length", "ranks", "split"), [(8, 2, 1), (11, 2, 1), (13, 3, 1), (97, 4, 3), (5, 4, 2)])
def test_the_parts_are_the_sequence(length: int, ranks: int, split: int) -> None:
    """Every row on one rank, a head and a tail each; labels, positions and documents go with their token, also over
    the cuts (a label that was shifted after the cut would be another piece's)."""
    tokens_BS = torch.randint(50, (2, length + 1))
    columns = {"weight": torch.rand(2, length)}
    batch = Batch(
        tokens_BS[:, :-1],
        tokens_BS[:, 1:],
        torch.arange(length).expand(2, -1),
        torch.randint(2, (2, length)).cumsum(1),
        columns,
    )
    padded = padded_length(length, ranks, split)
    assert padded % (2 * ranks) == 0 and padded // ranks % split == 0 and padded - length < 2 * ranks * split
    seen: list[int] = []
    for index in range(ranks):
        region = region_of(ranks, index, split)
        rows, part = region.rows(length), region.cut(batch)
        assert region.part_length(length) == len(rows) == padded // ranks and rows.tolist() == sorted(rows.tolist())
        true = rows[rows < length]
        whole: list[Tensor | None] = [batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS]
        parts = [part.tokens_BS, part.labels_BS, part.positions_BS, part.documents_BS]
        for mine, all_of_it in zip([*parts, part.columns["weight"]], [*whole, columns["weight"]]):
            assert mine is not None and all_of_it is not None
            assert torch.equal(mine[:, : len(true)], all_of_it[:, true])
        assert part.documents_BS is not None
        assert (part.labels_BS[:, len(true) :] == IGNORE_INDEX).all()
        assert (part.documents_BS[:, len(true) :] == PADDING).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(padded))
    everything = torch.arange(padded)
    by_rank = region_of(ranks, 0).by_rank(everything)
    assert by_rank.flatten().tolist() == seen and torch.equal(region_of(ranks, 0).whole(by_rank), everything)


def gathered(rank: int, world: int, length: int) -> tuple[Tensor, Tensor]:
    """A function of whole sequences that is no sum over tokens, and the gradient of this rank's part."""
    groups = ChaosGroups(seed=rank)
    from megalite.mesh import Mesh

    region = ContextRegion.of(Mesh(cp=world, rank=rank, make_group=groups), "gather", 1)
    whole = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    part = region.pad(whole, 7)[:, region.rows(length)].requires_grad_()
    together = region.gather(part, length)
    assert torch.equal(together, whole)
    (slope,) = torch.autograd.grad(together.cumsum(1).square().sum(), part)
    groups.verify()
    return slope, region.rows(length)


@pytest.mark.parametrize("length", [9, 16])
def test_gathered_outputs_give_each_rank_the_gradient_of_its_part(pool: Pool, length: int) -> None:
    whole = torch.randn(2, length, generator=torch.Generator().manual_seed(length)).requires_grad_()
    (expected,) = torch.autograd.grad(whole.cumsum(1).square().sum(), whole)
    for slope, rows in pool.run(gathered, 3, 3, length):
        true = rows < length
        torch.testing.assert_close(slope[:, true], expected[:, rows[true]])
        assert (slope[:, ~true] == 0).all()
