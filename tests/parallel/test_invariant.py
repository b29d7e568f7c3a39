"""`train.invariant`: weights, losses and norms are the same bits whatever the number of ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.source import CheckpointReader
from megalite.kernels import select_kernels
from megalite.mesh import CPU, Mesh
from megalite.optim.exact_norm import ExactNorm
from megalite.parallel.virtual_parts import kernels_of_parts, tree_sum
from tests.support.chaos import ChaosGroups
from tests.support.parity import (
    EVERYTHING,
    Case,
    Layout,
    assert_close,
    assert_same_bits,
    train_alone,
    train_virtually,
)
from tests.support.pool import Pool
from tests.support.tiny import write_recipe

SIZES: dict[str, Any] = {
    "model.heads": 8,
    "model.kv_heads": 4,
    "model.hidden_size": 20,
    "model.ffn_hidden_size": 36,
    "train.global_batch_size": 8,
    "train.invariant": 4,
}
"""Four parts of 9 columns, 2 query heads and 10 tokens each (37 with padding), and 2 samples."""

CASES = {
    "plain": Case.of(SIZES, steps=3),
    "everything": Case.of(SIZES | EVERYTHING, steps=2, documents=True),
    "bf16": Case.of(
        SIZES
        | {
            "train.precision": "bf16",
            "train.recompute": "selective",
            "model.feed_forward": "geglu",
            "model.final_logit_softcapping": 5.0,
        },
        steps=2,
    ),
}

LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(data=2, zero=0),
    Layout(data=4, zero=1),
    Layout(tensor=2, data=2, zero=1),
    Layout(tensor=2, pipeline=2, schedule="zb_h1"),
    Layout(data=2, pipeline=2, schedule="gpipe", zero=0),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_layout_gives_the_same_bits(case: Case, layout: Layout) -> None:
    assert_same_bits(train_virtually(case, layout, chaos=True), train_alone(case))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_twenty_steps(layout: Layout) -> None:
    case = dataclasses.replace(CASES["everything"], steps=20)
    assert_same_bits(train_virtually(case, layout, chaos=True), train_alone(case))


@pytest.mark.parametrize("case", [CASES["plain"], CASES["everything"]], ids=["plain", "everything"])
def test_it_trains_what_ordinary_training_does(case: Case) -> None:
    assert_close(train_alone(case), train_alone(case.having({"train.invariant": 0})))


def test_the_tree_adds_neighbours() -> None:
    terms = [torch.tensor(value) for value in (1e8, 1.0, -1e8, 1.0)]
    assert tree_sum(terms).item() == (terms[0] + terms[1] + (terms[2] + terms[3])).item() == 0.0
    assert tree_sum(terms[:3]).item() == (terms[0] + terms[1] + terms[2]).item()
    assert tree_sum(terms[:1]) is terms[0]


def sums(rank: int, world: int) -> list[Tensor]:
    """What this rank gets of an all-reduce, a maximum and a reduce-scatter among all, over late connections."""
    chaos = ChaosGroups(seed=rank, sums_up_the_tree=True)
    group = Mesh(dp=world, rank=rank, make_group=chaos).group("dp")
    generator = torch.Generator().manual_seed(rank)
    term = torch.randn(3 * world, 5, generator=generator) * 10.0 ** torch.randint(-9, 9, (3 * world, 5))
    total, largest, part = term.clone(), term.clone(), torch.empty(3, 5)
    works = [group.all_reduce(total), group.all_reduce(largest, "max"), group.reduce_scatter(part, term)]
    for work in works:
        work.wait()
    chaos.verify()
    return [term, total, largest, part]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sums_of_groups_go_up_the_tree(pool: Pool, world: int) -> None:
    ranks = pool.run(sums, world, world)
    terms = [rank[0] for rank in ranks]
    for index, (_, total, largest, part) in enumerate(ranks):
        assert torch.equal(total, tree_sum(terms))
        assert torch.equal(largest, torch.stack(terms).amax(0))
        assert torch.equal(part, tree_sum(terms)[3 * index : 3 * index + 3])


class Gradients(ExactNorm):
    """The norm of given gradients, as if of one rank."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._owned, self._zero, self._first = gradients, torch.zeros((), dtype=torch.float64), True
        self._world = Mesh().world


@pytest.mark.fast
@pytest.mark.parametrize("spread", [0, 3, 12, 30])
def test_the_norm_is_that_of_all_elements_however_they_are_cut(spread: int) -> None:
    elements = torch.randn(70_001) * 10.0 ** (torch.rand(70_001) * spread - spread)
    whole = Gradients([elements]).local_square_sum().item()
    exact = float(sum(Fraction(value) ** 2 for value in elements.tolist()))
    assert math.isclose(whole, exact, rel_tol=1e-15)
    for _ in range(5):
        cuts = sorted(random.sample(range(1, 70_000), 7))
        pieces = [elements[start:stop] for start, stop in itertools.pairwise([0, *cuts, 70_001])]
        random.shuffle(pieces)
        assert Gradients(pieces).local_square_sum().item() == whole


@pytest.mark.fast
def test_the_norm_of_nothing_and_of_what_is_not_finite() -> None:
    assert Gradients([torch.zeros(5)]).local_square_sum().item() == 0.0
    for value in (math.inf, math.nan):
        assert not math.isfinite(Gradients([torch.ones(3), torch.tensor([1.0, value])]).local_square_sum().item())


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_activations_of_parts_round_alike(name: str, dtype: torch.dtype) -> None:
    kernels = select_kernels({}, CPU)
    gate, up = (torch.randn(5, 3, 4 * 23).to(dtype) for _ in range(2))
    parts = [
        getattr(kernels_of_parts(kernels, 1), name)(torch.cat(part, -1))
        for part in zip(gate.chunk(4, -1), up.chunk(4, -1))
    ]
    assert torch.equal(getattr(kernels_of_parts(kernels, 4), name)(torch.cat((gate, up), -1)), torch.cat(parts, -1))


# Real jobs

JOB: dict[str, dict[str, Any]] = {
    "model": {
        "layers": 2,
        "hidden_size": 24,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 6,
        "ffn_hidden_size": 44,
        "vocab_size": 50,
        "max_positions": 64,
        "qk_norm": True,
        "tie_embeddings": True,
    },
    "train": {
        "steps": 20,
        "seq_length": 16,
        "global_batch_size": 8,
        "precision": "fp32",
        "invariant": 4,
        "eval_interval": 5,
        "eval_samples": 8,
    },
    "parallel": {"sequence": False},
    "optimizer": {"lr": 3e-3, "clip_grad": 0.5},
    "log": {"tensorboard": False},
}

RESIZED = [(5, (1, 1, 2)), (10, (2, 2, 2)), (15, (2, 1, 4)), (20, (2, 1, 1))]
"""[(last step, (tensor, pipeline, data))]; layouts of up to four ranks are above."""


def start(recipe: Path, folder: Path, shape: tuple[int, int, int], steps: int = 20) -> None:
    """Train up to a step, in a layout; a run that is there goes on."""
    tensor, pipeline, data = shape
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(tensor * pipeline * data)]
    command += ["-m", "megalite.train", str(recipe), "--run.dir", str(folder), "--train.stop_after", str(steps)]
    command += ["--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline)]
    command += ["--parallel.zero", str(data // 2 % 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def result(folder: Path) -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
    """All that the last checkpoint holds, weights and moments, and the numbers of each step."""
    with CheckpointReader(folder / "checkpoints" / "step_00000020") as reader:
        tensors = {
            f"{kind} {name}": reader.read_kind(kind, name, (0,) * len(shape), shape)
            for name, shape in reader.shapes().items()
            for kind in ("weight", "exp_avg", "exp_avg_sq")
        }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "validation_loss")
    return tensors, [tuple(line.get(name) for name in names) for line in lines]


def assert_equal(one: Any, other: Any) -> None:
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []
    assert one[1] == other[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_that_is_resized_to_eight_processes_and_back(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, data={"valid": [str(tmp_path / "tokens")]}, **JOB)
    start(recipe, tmp_path / "alone", (1, 1, 1))
    for steps, shape in RESIZED:
        start(recipe, tmp_path / "resized", shape, steps)
    assert_equal(result(tmp_path / "resized"), result(tmp_path / "alone"))
