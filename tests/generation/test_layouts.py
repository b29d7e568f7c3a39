"""Generation from live weights in every layout: what is drawn for a row depends on the row alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from megalite.config import Config, build_config
from megalite.config.check import check_layout
from megalite.data.batch import Batch
from megalite.generation.generator import Completion, Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.init import initialise_parameter
from megalite.model.sharded import ShardedModel
from megalite.parallel.buckets import ShardedBucket
from megalite.placement import PlacedParameter
from tests.support.chaos import ChaosGroups
from tests.support.parity import BASE, Layout
from tests.support.pool import Pool

CPU = torch.device("cpu")
FIELDS = {**BASE, "model.layers": 4, "model.vocab_size": 61, "model.max_positions": 64}
ROWS = 9
SAMPLINGS = (Sampling(0), Sampling(1.0, seed=3), Sampling(1.4, top_k=20, top_p=0.9, seed=4), Sampling(0.7, 0, 0.8, 5))

LAYOUTS = [
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=4),
    Layout(pipeline=2, schedule="interleaved"),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(tensor=2, pipeline=2, schedule="zb_v"),
    Layout(data=2, zero=2),
    Layout(data=2, zero=3),
    Layout(pipeline=2, schedule="interleaved", data=2, zero=3),
]


def config_of(layout: Layout, fields: Mapping[str, Any] = FIELDS) -> Config:
    tables: dict[str, dict[str, Any]] = {}
    for name, value in {**fields, **layout.fields}.items():
        section, field = name.split(".")
        tables.setdefault(section, {})[field] = value
    config = build_config(tables)
    check_layout(config, layout.world)
    return config


def _model(rank: int, layout: Layout, groups: ChaosGroups | None = None) -> ShardedModel:
    mesh = Mesh(
        pp=layout.pipeline,
        dp=layout.data,
        tp=layout.tensor,
        rank=rank,
        **({} if groups is None else {"make_group": groups}),
    )
    model = ShardedModel(config_of(layout), mesh, select_kernels({}, CPU))
    model.fill(_write)
    return model


def _write(parameter: PlacedParameter) -> None:
    """Weights of a model whose outputs are not all alike."""
    initialise_parameter(parameter, seed=7)
    if parameter.dim() == 2:
        parameter.mul_(6)


def _questions() -> tuple[list[list[int]], list[Limits]]:
    """Prompts and limits of all kinds. Which tokens are drawn is compared exactly, so all of it is fixed: a number may
    fall so near to the border of two tokens that rounding decides."""
    numbers = random.Random(2)
    prompts = [[numbers.randrange(61) for _ in range(numbers.choice([1, 2, 7, 7, 13, 19]))] for _ in range(ROWS)]
    limits = [Limits(numbers.choice([1, 6, 11, 17]), frozenset({numbers.randrange(61)})) for _ in range(ROWS)]
    return prompts, limits


def _generator(model: ShardedModel, stages: Any) -> Generator:
    return Generator(stages, model.owners, model.mesh, model.config.model)


def _answer(model: ShardedModel, rows: range) -> list[list[Completion]]:
    """The answers of these rows, by the ways of sampling."""
    prompts, limits = _questions()
    mine, own = [prompts[row] for row in rows], [limits[row] for row in rows]
    with model.generating() as stages:
        return [_generator(model, stages).run(mine, sampling, own, rows=rows) for sampling in SAMPLINGS]


def _on_rank(rank: int, layout: Layout) -> tuple[range, list[list[Completion]]]:
    groups = ChaosGroups(seed=rank)
    model = _model(rank, layout, groups)
    rows = range(model.mesh.samples_index, ROWS, layout.data)
    result = _answer(model, rows)
    groups.verify()
    return rows, result


def _close(one: Completion, other: Completion) -> bool:
    same = (one.prompt_ids, one.new_ids, one.reason) == (other.prompt_ids, other.new_ids, other.reason)
    return same and max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-5


@pytest.fixture(scope="module")
def alone() -> list[list[Completion]]:
    """In one process, each row by itself."""
    prompts, limits = _questions()
    model = _model(0, Layout())
    with model.generating() as stages:
        generator = _generator(model, stages)
        return [
            [generator.run([prompts[row]], sampling, limits[row], rows=[row])[0] for row in range(ROWS)]
            for sampling in SAMPLINGS
        ]


def test_a_row_is_drawn_as_it_is_alone(alone: list[list[Completion]]) -> None:
    """In one batch, whose rows end one after the other."""
    together = _answer(_model(0, Layout()), range(ROWS))
    for some, others in zip(together, alone, strict=True):
        assert all(map(_close, some, others))
    assert {completion.reason for row in alone for completion in row} == {"token", "length"}
    assert len({len(completion.new_ids) for completion in alone[1]}) > 3


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_draw_the_same_tokens(pool: Pool, layout: Layout, alone: list[list[Completion]]) -> None:
    """Every rank has all completions of its copy of the model, under groups that complete late and poison buffers."""
    for rows, result in pool.run(_on_rank, layout.world, layout):
        for some, others in zip(result, alone, strict=True):
            assert all(map(_close, some, [others[row] for row in rows]))


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, sequence=True, pipeline=2), Layout(data=2, zero=3)], ids=lambda x: x.name
)
def test_log_probabilities_are_the_trainers(pool: Pool, layout: Layout) -> None:
    """The model's, whatever the sampling: to 1e-5 those of its own scoring pass over the finished texts."""
    assert max(pool.run(_difference, layout.world, layout)) < 1e-5


def _difference(rank: int, layout: Layout) -> float:
    model = _model(rank, layout)
    worst = 0.0
    for completions in _answer(model, range(ROWS)):
        tokens_BS, labels_BS = torch.zeros(2, ROWS, 40, dtype=torch.int64)
        labels_BS -= 100
        for row, completion in enumerate(completions):
            ids = torch.tensor(completion.prompt_ids + completion.new_ids)
            tokens_BS[row, : len(ids)] = ids
            labels_BS[row, len(completion.prompt_ids) - 1 : len(ids) - 1] = ids[len(completion.prompt_ids) :]
        for scored_2BS in model.score([Batch(tokens_BS, labels_BS)], shape=(ROWS, 40)):
            theirs = scored_2BS[0][labels_BS >= 0]
            mine = torch.tensor([number for completion in completions for number in completion.logprobs])
            worst = max(worst, float((mine - theirs).abs().max()))
    return worst


def _counted(function: Callable[[], None], calls: list[int]) -> Callable[[], None]:
    def call() -> None:
        calls.append(1)
        function()

    return call


def _pinned(rank: int, layout: Layout) -> tuple[int, int]:
    """All-gathers of weights in a run of many tokens, and in all."""
    model = _model(rank, layout)
    gathers = []
    for buckets in model.buckets.values():
        for bucket in buckets.buckets:
            if isinstance(bucket, ShardedBucket):
                bucket.unshard = _counted(bucket.unshard, gathers)
    prompts, _ = _questions()
    with model.generating() as stages:
        before = len(gathers)
        _generator(model, stages).run(prompts, Sampling(0), Limits(20))
        return len(gathers) - before, before


def test_weights_are_gathered_once(pool: Pool) -> None:
    """Under ZeRO-3: before the first token, and not again."""
    for during, before in pool.run(_pinned, 2, Layout(data=2, zero=3)):
        assert (during, before > 0) == (0, True)
