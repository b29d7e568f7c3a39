"""Train one small model in any layout and look at everything that came out, in terms of the global model.

A `Case` is a configuration and a number of steps. `train` runs it on the worker pool and puts the ranks' pieces
together by what their placements say, checking on the way that the boxes tile every global tensor exactly and that
all who hold an element hold the same bits. Shapes: G micro-batches of B samples, S tokens each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config, build_config
from megalite.config.check import check_layout
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.mesh import GroupFactory, Mesh, create_group
from megalite.model.decoder import Stage
from megalite.objective import Objective
from megalite.optim.lr_schedule import learning_rate
from megalite.parallel.virtual_parts import tree_groups
from megalite.placement import Box, placed_parameters
from megalite.schedule.schedules import SCHEDULES, find_schedule
from megalite.train.invariant_trainer import InvariantTrainer
from megalite.train.trainer import Trainer
from tests.support.chaos import ChaosGroups
from tests.support.pool import Pool
from tests.support.virtual import World

BASE: dict[str, Any] = {
    "run.seed": 7,
    "model.layers": 3,
    "model.hidden_size": 20,
    "model.ffn_hidden_size": 36,
    "model.heads": 12,
    "model.kv_heads": 3,
    "model.head_dim": 4,
    "model.vocab_size": 37,
    "model.max_positions": 32,
    "train.steps": 8,
    "train.seq_length": 12,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 4,
    "train.precision": "fp32",
    "optimizer.lr": 3e-3,
    "optimizer.eps": 1e-5,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 2,
}
"""3 layers, 12 query and 3 key/value heads, 37 tokens: nothing here divides by everything.

The learning rate moves the weights by a good tenth of their size in 8 steps. At three times that, training on these
random tokens is so unstable that one process started from weights 1e-7 apart ends 1e-4 apart.
"""

EVERYTHING: dict[str, Any] = {
    "model.tie_embeddings": True,
    "model.qk_norm": True,
    "model.attention_bias": True,
    "model.sliding_window": 5,
    "train.z_loss": 1e-3,
}


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work. `name` is how a test names it: t2s-p2-1f1b-d1."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    schedule: str = "1f1b"
    data: int = 1
    zero: int = 1
    context: int = 1
    mode: str = "gather"
    expert: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def pure_pipeline(self) -> bool:
        return self.tensor == self.data == self.context == 1

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "parallel.tensor": self.tensor,
            "parallel.sequence": self.sequence,
            "parallel.pipeline": self.pipeline,
            "parallel.schedule": self.schedule,
            "parallel.virtual_stages": find_schedule(self.schedule).least_chunks,
            "parallel.zero": self.zero,
            "parallel.context": self.context,
            "parallel.context_mode": self.mode,
            "parallel.expert": self.expert,
        }

    @property
    def name(self) -> str:
        return (
            f"t{self.tensor}{'s' if self.sequence else ''}"
            f"-p{self.pipeline}{'-' + self.schedule if self.pipeline > 1 else ''}"
            f"-d{self.data}{f'-z{self.zero}' if self.data * self.context > 1 else ''}"
            f"{f'-c{self.context}-{self.mode}' if self.context > 1 else ''}"
            f"{f'-e{self.expert}' if self.expert > 1 else ''}"
        )


def layouts(limit: int) -> Iterator[Layout]:
    """Every layout of 2 to `limit` processes out of tensor, sequence, pipeline, schedule, data and ZeRO 0 to 3."""
    sizes = range(1, limit + 1)
    for tensor, pipeline, data in ((t, p, d) for t in sizes for p in sizes for d in sizes if 1 < t * p * d <= limit):
        for sequence in (False, True) if tensor > 1 else (False,):
            for schedule in SCHEDULES if pipeline > 1 else ("1f1b",):
                for zero in (0, 1, 2, 3) if data > 1 and schedule != "gpipe" else (0, 1) if data > 1 else (1,):
                    yield Layout(tensor, sequence, pipeline, schedule, data, zero)


@dataclass(frozen=True)
class Case:
    """What is trained: `fields` of the configuration (over BASE), steps, whether documents restart positions, and what
    a step minimises."""

    fields: tuple[tuple[str, Any], ...] = ()
    steps: int = 8
    documents: bool = False
    objective: Objective | None = None

    @staticmethod
    def of(fields: Mapping[str, Any] | None = None, **options: Any) -> Case:
        return Case(tuple(sorted((BASE | dict(fields or {})).items())), **options)

    def having(self, fields: Mapping[str, Any]) -> Case:
        return dataclasses.replace(self, fields=tuple(sorted((dict(self.fields) | dict(fields)).items())))

    def config(self, world: int) -> Config:
        tables: dict[str, dict[str, Any]] = {}
        for path, value in self.fields:
            section, name = path.split(".")
            tables.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
        config = build_config(tables)
        check_layout(config, world)
        return config


@dataclass
class Piece:
    """The part of a global tensor that one box holds."""

    box: Box
    values: np.ndarray

    @staticmethod
    def of(box: Box, values: Tensor) -> Piece:
        return Piece(box, values.detach().float().reshape(box.size).clone().numpy())


@dataclass
class RankOutcome:
    """One rank's view: numbers that all ranks must share, and its pieces."""

    losses: list[float]
    grad_norms: list[float]
    evaluation: tuple[float, int]
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[Piece] = field(default_factory=list)
    weights: list[Piece] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What the whole job produced. `gradients` are those of the first step, whole; `weights` those after the last."""

    losses: list[float]
    grad_norms: list[float]
    evaluation: tuple[float, int]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]


def sample(number: int, config: Config, documents: bool) -> tuple[Tensor, ...]:
    """Tokens, labels (and positions, documents) of a global sample, each [S]: a function of its number alone.

    Labels are ignored unevenly: every fifth sample whole, the others by a share that grows with their number.
    """
    length, generator = config.train.seq_length, torch.Generator().manual_seed(1000 + number)
    tokens = torch.randint(config.model.vocab_size, (length + 1,), generator=generator)
    labels = tokens[1:].clone()
    share = 1.0 if number % 5 == 3 else 0.1 * (number % 7)
    labels[torch.rand(length, generator=generator) < share] = IGNORE_INDEX
    if not documents:
        return tokens[:-1], labels
    starts = torch.rand(length, generator=generator) < 0.3
    starts[0] = True
    numbers = starts.long().cumsum(0) - 1
    firsts = torch.where(starts, torch.arange(length), 0).cummax(0).values
    return tokens[:-1], labels, torch.arange(length) - firsts, numbers


def micro_batches(first: int, samples: int, config: Config, mesh: Mesh, documents: bool) -> list[Batch]:
    """This data rank's micro-batches of the samples [first, first + samples), as the data loader deals them."""
    size, parts = config.train.micro_batch_size, config.train.invariant or mesh.samples_size
    own = parts // mesh.samples_size
    starts = [
        start
        for part in range(mesh.samples_index * own, (mesh.samples_index + 1) * own)
        for start in range(first + part * size, first + samples, size * parts)
    ]
    rows = [[sample(number, config, documents) for number in range(start, start + size)] for start in starts]
    return [Batch(*(torch.stack(column) for column in zip(*block))) for block in rows]


def mesh_of(config: Config, rank: int, world: int, make_group: Any = create_group) -> Mesh:
    """The mesh of a configuration's layout."""
    parallel = config.parallel
    if config.train.invariant and make_group is create_group:
        make_group = tree_groups(make_group)
    return Mesh(
        pp=parallel.pipeline,
        dp=config.data_parallel(world) // parallel.expert,
        ep=parallel.expert,
        cp=parallel.context,
        tp=parallel.tensor,
        rank=rank,
        make_group=make_group,
    )


def build_trainer(config: Config, rank: int, world: int, make_group: Any = create_group, **options: Any) -> Trainer:
    """A trainer with initial weights, and the kernels that the configuration names."""
    mesh = mesh_of(config, rank, world, make_group)
    kind = InvariantTrainer if config.train.invariant else Trainer
    trainer = kind(config, mesh, select_kernels(dataclasses.asdict(config.kernels), mesh.device), **options)
    trainer.initialise()
    return trainer


def pieces_of_weights(trainer: Trainer) -> list[Piece]:
    """Every box of every parameter; checks that padding, which is in no box, is zero."""
    pieces = []
    for number, stage in trainer.stages.items():
        with trainer.buckets[number].whole():
            pieces += pieces_of_stage(stage)
    return pieces


def pieces_of_stage(stage: Stage) -> Iterator[Piece]:
    for parameter in placed_parameters(stage):
        if parameter.tied_to is not None:  # the same storage as the embedding
            assert parameter.data_ptr() == parameter.tied_to.data_ptr()
            continue
        padding = parameter.detach().clone()
        for box in parameter.placement.boxes:
            yield Piece.of(box, box.view(parameter))
            box.view(padding).zero_()
        assert not padding.any(), f"padding of {parameter.placement} is not zero"


def pieces_of_gradients(trainer: Trainer) -> list[Piece]:
    """The reduced gradients where the optimizer finds them: this rank's segments of the buckets."""
    return [
        Piece.of(box, segment.gradient[part])
        for segment in trainer.optimizer.segments
        for box, part in segment.pieces()
    ]


def train_rank(
    rank: int, case: Case, world: int, chaos: bool, make_group: GroupFactory = create_group, **options: Any
) -> RankOutcome:
    """Train on this rank: gradients of the first step, then all steps, then an evaluation. `options` are chaos's."""
    config = case.config(world)
    groups = ChaosGroups(rank + 1, make_group, sums_up_the_tree=config.train.invariant > 0, **options)
    make_group = groups if chaos else make_group
    trainer = build_trainer(config, rank, world, make_group, objective=case.objective)

    def batches(first: int, samples: int) -> list[Any]:
        made = micro_batches(first, samples, config, trainer.mesh, case.documents)
        return made if trainer.needs_batches or case.documents else [None] * len(made)

    trainer.accumulate(batches(0, config.batch_size_at(0)))
    outcome = RankOutcome([], [], (0.0, 0), gradients=pieces_of_gradients(trainer))
    first = 0
    for step in range(1, case.steps + 1):
        samples = config.batch_size_at(first)
        result = trainer.step(batches(first, samples), learning_rate(step, config))
        assert result.accepted
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
        outcome.metrics.append(result.metrics)
        first += samples
    if trainer.objective.reads != "values":
        outcome.evaluation = trainer.evaluate(batches(first, config.train.global_batch_size))
    outcome.weights = pieces_of_weights(trainer)
    if chaos:
        groups.verify()
    return outcome


def assemble(ranks: list[list[Piece]], copies: int, of_experts: int = 1) -> dict[str, Tensor]:
    """Whole tensors from all ranks' pieces.

    Fails unless every element is covered, exactly once by each of its replicas times `copies` (data-parallel ranks
    that hold the same; `of_experts` for experts), and all of them hold the same bits.
    """
    whole: dict[str, Tensor] = {}
    missing: dict[str, Tensor] = {}
    for piece in (piece for pieces in ranks for piece in pieces):
        box = piece.box
        full = whole.setdefault(box.name, torch.full(box.shape, math.nan))
        left = missing.setdefault(box.name, torch.full(box.shape, -1, dtype=torch.int64))
        assert tuple(full.shape) == box.shape, f"{box.name}: {box.shape} and {tuple(full.shape)}"
        there, holders, values = box.of(full), box.of(left), torch.from_numpy(piece.values)
        fresh = holders < 0
        assert torch.equal(there[~fresh], values[~fresh]), f"{box.name}: replicas differ"
        there.copy_(values)
        times = of_experts if ".experts." in box.name else copies
        holders.copy_(torch.where(fresh, times * len(box.replicas), holders) - 1)
    for name, left in missing.items():
        assert not left.any(), f"{name}: not every element is held by all that should, and by them alone"
        assert not whole[name].isnan().any(), f"{name} holds NaN"
    return whole


def train_virtually(case: Case, layout: Layout, chaos: bool = False) -> Outcome:
    """The same with all ranks in this process, one after the other; with `chaos` in any order, and interrupted."""
    case = case.having(layout.fields)
    world = World(layout.world, random.Random(layout.name) if chaos else None)
    ranks = world.run(lambda rank, make: train_rank(rank, case, layout.world, chaos, make, pause=world.pause))
    return combine(ranks, layout)


def train(pool: Pool, case: Case, layout: Layout, chaos: bool = False) -> Outcome:
    case = case.having(layout.fields)
    case.config(layout.world)
    ranks = pool.run(train_rank, layout.world, case, layout.world, chaos)
    return combine(ranks, layout)


def assert_agree(layout: Layout, ours: Outcome, alone: Outcome, relative: float = 1e-5) -> None:
    """A pipeline without other axes computes what one process does; the others sum in another order."""
    if layout.pure_pipeline:
        assert_same_bits(ours, alone)
    else:
        assert_close(ours, alone, relative)


def assert_trains_as_alone(case: Case, layout: Layout, relative: float = 1e-5) -> None:
    """The layout, with messages late and in any order, against one process."""
    assert_agree(layout, train_virtually(case, layout, chaos=True), train_alone(case), relative)


@functools.cache
def train_alone(case: Case) -> Outcome:
    """The reference: one process, this one, without any communication."""
    return combine([train_rank(0, case, 1, False)], Layout())


def combine(ranks: list[RankOutcome], layout: Layout) -> Outcome:
    first = ranks[0]
    for rank in ranks:
        shared = (rank.losses, rank.grad_norms, rank.evaluation, rank.metrics)
        assert shared == (first.losses, first.grad_norms, first.evaluation, first.metrics), "ranks disagree on a number"
    copies = layout.data * layout.context
    of_experts = copies // layout.expert
    whole = layout.zero == 0
    gradients = assemble([rank.gradients for rank in ranks], copies if whole else 1, of_experts if whole else 1)
    weights = assemble([rank.weights for rank in ranks], copies, of_experts)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert math.isclose(first.grad_norms[0], norm, rel_tol=1e-6), "the gradient norm is not that of the gradients"
    return Outcome(first.losses, first.grad_norms, first.evaluation, gradients, weights, first.metrics)


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    for what in ("gradients", "weights"):
        ours, theirs = getattr(one, what), getattr(other, what)
        assert ours.keys() == theirs.keys()
        differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not differing, f"{what} differ: {differing}"
    assert one.losses == other.losses
    assert one.grad_norms == other.grad_norms
    for ours, theirs in zip(one.metrics, other.metrics, strict=True):  # sums over stages, in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    assert one.evaluation == other.evaluation


def distance(ours: Tensor, theirs: Tensor) -> float:
    """|a - b| / |b|; 0 where both are zero."""
    size = theirs.double().norm().item()
    gap = (ours.double() - theirs.double()).norm().item()
    return gap / size if size else (math.inf if gap else 0.0)


def assert_close(one: Outcome, other: Outcome, relative: float = 1e-5) -> None:
    """Gradients and weights, tensor by tensor, and losses and gradient norms to `relative`."""
    for what in ("gradients", "weights"):
        ours, theirs = getattr(one, what), getattr(other, what)
        assert ours.keys() == theirs.keys()
        far = {name: gap for name in theirs if not (gap := distance(ours[name], theirs[name])) <= relative}
        assert not far, f"{what} differ: {far}"
    torch.testing.assert_close(one.losses, other.losses, rtol=relative, atol=0.0)
    torch.testing.assert_close(one.grad_norms, other.grad_norms, rtol=relative, atol=0.0)
    for ours, theirs in zip(one.metrics, other.metrics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=1e-12)
    assert one.evaluation[1] == other.evaluation[1]
    torch.testing.assert_close(one.evaluation[0], other.evaluation[0], rtol=relative, atol=0.0)
