"""Fine-tuning, DPO and the reward model, packed, in every kind of layout, against transformers computing one unpacked
sequence at a time: the loss and every gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.source import fill_model
from megalite.config import Config, build_config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.objective.next_token import NextToken
from megalite.objective.preference import DPO, REFERENCE, BradleyTerry
from megalite.train.trainer import Trainer
from tests.align import peer
from tests.support.chaos import ChaosGroups
from tests.support.parity import Layout, Piece, assemble, distance, pieces_of_gradients
from tests.support.pool import Pool

LENGTH, ROWS, BETA = 64, 8, 0.3
LAYOUTS = (
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    *(Layout(data=2, zero=zero) for zero in range(4)),
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(pipeline=2, schedule="interleaved", data=2),
    Layout(pipeline=2, schedule="zb_h1"),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(context=2, mode="ring", tensor=2),
)
KINDS = ("sft", "dpo", "reward")


@cache
def examples() -> list[peer.Example]:
    return peer.random_examples(20, seed=11)


@cache
def pairs() -> list[list[peer.Example]]:
    flat = peer.random_examples(26, seed=12)
    return [flat[2 * number : 2 * number + 2] for number in range(13)]


def rows_of(kind: str, packing: bool = True, length: int = LENGTH) -> list[list[peer.Example]]:
    groups = [[example] for example in examples()] if kind == "sft" else pairs()
    if not packing:
        return [list(group) for group in groups]
    return peer.in_rows(groups, length, ROWS)


def score_weight() -> Tensor:
    return torch.randn(1, peer.SHAPE["hidden_size"], generator=torch.Generator().manual_seed(5))


def config_of(layout: Layout, rows: int = ROWS, length: int = LENGTH, model: Any = None) -> Config:
    tables: dict[str, dict[str, Any]] = {"model": model or {}}
    for path, value in layout.fields.items():
        section, name = path.split(".")
        tables.setdefault(section, {})[name] = value
    train = {"seq_length": length, "micro_batch_size": 1, "global_batch_size": rows, "precision": "fp32"}
    return build_config(tables | {"train": train})


class WithScore:
    """The policy's tensors and a score weight; the output layer is left behind."""

    def __init__(self, source: Any) -> None:
        self._source, self.directory = source, "policy with a score"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        own = {name: shape for name, shape in self._source.shapes().items() if name != "lm_head.weight"}
        return own | {"score.weight": (1, peer.SHAPE["hidden_size"])}

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        if name != "score.weight":
            return self._source.read(name, offset, size)
        return score_weight()[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]


def run_rank(
    rank: int, layout: Layout, policy: Path, reference: Path, chaos: bool, kinds: Sequence[str], packing: bool
) -> dict[str, Any]:
    """Loss, metrics and gradients of each objective on this rank."""
    with HuggingFaceSource(policy) as theirs, HuggingFaceSource(reference) as base:
        groups = ChaosGroups(seed=rank + 1)
        found: dict[str, Any] = {}
        for kind in kinds:
            rows = rows_of(kind, packing)
            extra = -len(rows) % (4 * layout.data)
            rows = rows + [[]] * extra
            config = config_of(layout, len(rows), model=dataclasses.asdict(theirs.model))
            options: dict[str, Any] = {"make_group": groups} if chaos else {}
            sizes = {"pp": layout.pipeline, "dp": layout.data, "cp": layout.context, "tp": layout.tensor}
            mesh = Mesh(**sizes, rank=rank, **options)
            kernels = select_kernels({}, mesh.device)
            objective = {"sft": NextToken(), "dpo": DPO(BETA), "reward": BradleyTerry()}[kind]
            trainer = Trainer(config, mesh, kernels, objective=objective)
            fill_model(trainer, WithScore(theirs) if kind == "reward" else theirs)
            trainer.optimizer.restart()
            batches: list[Batch] = [peer.packed([row], LENGTH) for row in rows][mesh.index("dp") :: mesh.dp]
            frozen = ShardedModel(config, mesh, kernels, trained=False)
            if kind == "dpo":
                for name, source in (("away", base), ("same", theirs)):
                    fill_model(frozen, source)
                    if scores := frozen.score(batches):
                        here = [
                            dataclasses.replace(batch, columns={**batch.columns, REFERENCE: score[0]})
                            for batch, score in zip(batches, scores, strict=True)
                        ]
                    else:
                        here = batches
                    if name == "away":
                        away = here
                    else:
                        found["same"] = trainer.measure(here)
                batches = away
            measured = trainer.measure(batches)
            trainer.accumulate(batches)
            found[kind] = (measured, pieces_of_gradients(trainer))
            for model in (trainer, frozen):
                model.wait_for_all_gather()
        if chaos:
            groups.verify()
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return peer.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def expected(models: tuple[Path, Path]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    policy, reference = peer.load(models[0]), peer.load(models[1])
    return {
        "sft": peer.sft(policy, examples()),
        "dpo": peer.dpo(policy, reference, pairs(), BETA),
        "reward": peer.reward(policy, score_weight(), pairs()),
    }


def gather(ranks: list[dict[str, Any]], kind: str, layout: Layout) -> tuple[float, dict[str, Tensor]]:
    assert all(rank[kind][0] == ranks[0][kind][0] for rank in ranks), "ranks disagree"
    pieces: list[list[Piece]] = [rank[kind][1] for rank in ranks]
    return ranks[0][kind][0][0], assemble(pieces, layout.data * layout.context if layout.zero == 0 else 1)


def compare(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert math.isclose(found[0], expected[0], rel_tol=1e-5, abs_tol=1e-5)
    assert found[1].keys() == expected[1].keys()
    far = {name: gap for name, theirs in expected[1].items() if not (gap := distance(found[1][name], theirs)) <= 1e-5}
    assert not far, f"gradients differ: {far}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_and_gradients_in_every_kind_of_layout(
    layout: Layout, models: tuple[Path, Path], expected: dict[str, Any], pool: Pool
) -> None:
    chaos = layout.world > 1
    ranks = pool.run(run_rank, layout.world, layout, *models, chaos, KINDS, True)
    alone = [run_rank(0, Layout(), *models, False, KINDS, True)] if layout.pure_pipeline else None
    for kind in KINDS:
        found = gather(ranks, kind, layout)
        compare(found, expected[kind])
        if alone is not None:
            same = gather(alone, kind, Layout())
            assert found[0] == same[0]
            assert all(torch.equal(found[1][name], same[1][name]) for name in same[1])
    for rank in ranks:
        loss, units, metrics = rank["same"]
        assert units == len(pairs())
        assert loss == math.log(2) and metrics["accuracy"] == 0.0 and metrics["margin"] == 0.0


def test_packed_or_alone_in_a_row(models: tuple[Path, Path], expected: dict[str, Any]) -> None:
    found = run_rank(0, Layout(), *models, False, KINDS, False)
    for kind in KINDS:
        compare(gather([found], kind, Layout()), expected[kind])


def logprobs_and_values(models: tuple[Path, Path], rows: Sequence[Sequence[peer.Example]]) -> tuple[Tensor, Tensor]:
    """[B, S] each, of one process."""
    with HuggingFaceSource(models[0]) as theirs:
        found = []
        for head, source in (("vocabulary", theirs), ("scalar", WithScore(theirs))):
            config = config_of(Layout(), len(rows), model=dataclasses.asdict(theirs.model))
            mesh = Mesh()
            model = ShardedModel(config, mesh, select_kernels({}, mesh.device), head=head, trained=False)
            fill_model(model, source)
            batches = [peer.packed(rows, LENGTH)]
            shape = (len(rows), LENGTH)
            found.append(
                model.score(batches, shape=shape)[0][0]
                if head == "vocabulary"
                else model.values(batches, shape=shape)[0]
            )
        return found[0], found[1]


def test_a_changed_neighbour_changes_no_bit_of_another_example(models: tuple[Path, Path]) -> None:
    first, second, third = peer.random_examples(3, seed=21, longest=16)
    before = logprobs_and_values(models, [[first, second, third], [third, first, second]])
    other = peer.Example(tuple(52 - token for token in second.ids), second.answer)
    after = logprobs_and_values(models, [[first, other, third], [third, first, other]])
    start, stop = len(first.ids), len(first.ids) + len(second.ids)
    kept = torch.ones(2, LENGTH, dtype=torch.bool)
    kept[0, start:stop] = False
    kept[1, len(third.ids) + start : len(third.ids) + stop] = False
    for ours, theirs in zip(before, after):
        assert torch.equal(ours[kept], theirs[kept])
        assert not torch.equal(ours, theirs)


def test_a_conversation_with_one_learned_token_weighs_one_token(models: tuple[Path, Path]) -> None:
    several = examples()[:4]
    assert len(several[1].ids) - several[1].answer == 1
    batch = peer.packed(peer.in_rows([[each] for each in several], LENGTH, 3), LENGTH)
    assert NextToken().units(batch) == sum(len(each.ids) - each.answer for each in several)
