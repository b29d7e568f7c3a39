"""Muon against its definition in float64 on whole matrices, against torch's, and in every layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megalite.checkpoint.manager import CheckpointManager
from megalite.data.batch import Batch
from megalite.errors import UserError
from megalite.model.feed_forward import SwiGLU
from megalite.optim.muon import COEFFICIENTS, MOMENTUM, RMS, Muon, newton_schulz, newton_schulz_flops
from megalite.optim.whole_matrices import WholeMatrices
from tests.checkpoint import support
from tests.support.chaos import ChaosGroups
from tests.support.parity import (
    BASE,
    Case,
    Layout,
    Piece,
    assemble,
    assert_same_bits,
    assert_trains_as_alone,
    build_trainer,
    distance,
    micro_batches,
    pieces_of_gradients,
    pieces_of_weights,
    train,
)
from tests.support.pool import Pool
from tests.support.virtual import World

MUON: dict[str, Any] = {"optimizer.kind": "muon", "train.global_batch_size": 8}
EXPERTS: dict[str, Any] = {"model.experts": 6, "model.expert_ffn_hidden_size": 12, "model.shared_experts": 1}

SHAPES = [(20, 20), (36, 20), (20, 36), (1, 7), (5, 64)]


def reference(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz as it is written down, in float64: by its singular values, of which it is a polynomial."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(steps):
        values = sum(factor * values**power for factor, power in zip(COEFFICIENTS, (1, 3, 5)))
    return left @ torch.diag(values) @ right


@pytest.mark.fast
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    matrix = torch.randn(shape) * 10 ** float(torch.empty(()).uniform_(-4, 2))
    assert distance(newton_schulz(matrix, steps), reference(matrix, steps)) < 1e-5
    assert distance(newton_schulz(matrix.bfloat16(), steps), reference(matrix.bfloat16(), steps)) < 5e-2
    assert not newton_schulz(torch.zeros(shape), steps).any()
    if steps == 5 and min(shape) == 20:
        assert torch.linalg.svdvals(newton_schulz(matrix, steps))[:10].sub(1).abs().max() < 0.35


class Products(TorchFunctionMode):
    """Counts the FLOPs of matrix products."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.addmm):
            one, other = args[-2:]
            self.flops += 2 * one.shape[0] * one.shape[1] * other.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.fast
def test_counted_flops_are_those_of_the_products() -> None:
    for shape in SHAPES:
        with Products() as counter:
            newton_schulz(torch.randn(shape), 3)
        assert counter.flops == newton_schulz_flops(shape, 3)


def matrices_of(trainer: Any) -> set[str]:
    return {box.name for part in trainer.optimizer.segments if part.bucket.role == "matrix" for box, _ in part.pieces()}


def masters_of(trainer: Any) -> dict[str, Tensor]:
    pieces = [
        Piece.of(box, segment.master[where])
        for segment in trainer.optimizer.segments
        for box, where in segment.pieces()
    ]
    return assemble([pieces], 1)


def test_three_steps_of_torch_optim_muon() -> None:
    """Momentum, Nesterov's form, scale and decay; the iterations in bf16, as torch has them."""
    fields = {"optimizer.muon_lr": 0.02, "optimizer.lr": 4e-3, "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.3}
    config = Case.of(MUON | fields | {"train.precision": "bf16"}).config(1)
    trainer = build_trainer(config, 0, 1)
    first, matrices = masters_of(trainer), matrices_of(trainer)
    assert len(matrices) == 3 * 7 and "model.embed_tokens.weight" not in matrices
    parameters = {name: torch.nn.Parameter(first[name].clone()) for name in sorted(matrices)}
    optimizer = torch.optim.Muon(
        parameters.values(), lr=0.02, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        trainer.accumulate(micro_batches(8 * step, 8, config, trainer.mesh, False))
        gradients = assemble([pieces_of_gradients(trainer)], 1)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        trainer.optimizer.step(4e-3, 1.0)
        optimizer.step()
    ours = masters_of(trainer)
    for name, parameter in parameters.items():
        moved = parameter.detach() - first[name]
        assert distance(ours[name] - first[name], moved) < 1e-2, name
        assert moved.norm() > first[name].norm() / 4


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_buckets_hold_one_role_in_the_order_of_backward(kind: str) -> None:
    trainer = build_trainer(Case.of(EXPERTS | {"optimizer.kind": kind, "model.dense_layers": (0,)}).config(1), 0, 1)
    roles = []
    for segment in trainer.optimizer.segments:
        [role] = {slot.parameter.placement.role for slot in segment.bucket.slots}
        assert role == segment.bucket.role
        roles.append(role)
    assert roles == ["output", "matrix", "embedding", "vector"]


# In every layout, against whole matrices in float64

Steps = list[tuple[list[Piece], list[Piece], list[Piece]]]


def updated(
    rank: int, case: Case, world: int, steps: int, **options: Any
) -> tuple[Steps, dict[str, set[str]], list[str], int]:
    """(gradients, weights before, weights after) of some steps on this rank; the state of what by name; the matrices
    that it works on; the elements that it sends to workers."""
    config, groups = case.config(world), ChaosGroups(seed=rank + 1, **options)
    trainer = build_trainer(config, rank, world, groups)
    found: Steps = []
    for step in range(steps):
        batches = micro_batches(8 * step, 8, config, trainer.mesh, False)
        trainer.accumulate(batches if trainer.needs_batches else [None] * len(batches))
        gradients, before = pieces_of_gradients(trainer), pieces_of_weights(trainer)
        trainer.optimizer.step(RATE, SCALE)
        found.append((gradients, before, pieces_of_weights(trainer)))
    groups.verify()
    states: dict[str, set[str]] = {}
    for segment in trainer.optimizer.segments:
        for box, _ in segment.pieces():
            states.setdefault(box.name, set()).update(segment.state)
    rule = trainer.optimizer.rule
    assert isinstance(rule, Muon)
    sent = sum(sum(this.out_counts[0]) for whole in rule._whole for this in whole._rounds)
    return found, states, [name for whole in rule._whole for name in whole.own], sent


RATE, SCALE, STEPS = 0.3, 0.7, 3
"""So large a rate that the rounding of the weights does not hide that of the updates."""


def compare_updates(fields: dict[str, Any], layout: Layout) -> None:
    case = Case.of(MUON | fields).having(layout.fields)
    config = case.config(layout.world).optimizer
    world = World(layout.world, random.Random(layout.name))
    ranks = world.run(lambda rank, make: updated(rank, case, layout.world, STEPS, make=make, pause=world.pause))
    copies = layout.data * layout.context
    momentum: dict[str, Tensor] = {}
    for step in range(STEPS):
        sent = (copies, copies // layout.expert) if layout.zero == 0 else (1, 1)
        gradients = assemble([rank[0][step][0] for rank in ranks], *sent)
        before, after = (
            assemble([rank[0][step][at] for rank in ranks], copies, copies // layout.expert) for at in (1, 2)
        )
        for name, weight in before.items():
            if ranks_state(ranks, name) != {MOMENTUM}:
                assert ranks_state(ranks, name) == {"exp_avg", "exp_avg_sq"}, name
                continue
            gradient = SCALE * gradients[name].double()
            buffer = momentum.get(name, torch.zeros_like(gradient)) * config.momentum
            momentum[name] = buffer = buffer + (1 - config.momentum) * gradient
            nesterov = config.momentum * buffer + (1 - config.momentum) * gradient
            update = RMS * max(weight.shape) ** 0.5 * reference(nesterov)
            ours = weight.double() * (1 - RATE * config.weight_decay) - after[name].double()
            assert distance(ours, RATE * update) < 1e-5, (step, name)
    worked = sorted(name for rank in ranks for name in rank[2])
    assert worked == sorted(momentum), "every matrix has one worker"
    assert sum(rank[3] for rank in ranks) == sum(whole.numel() for whole in momentum.values()), "and is sent once"
    if not config_has_experts(fields) and layout.world > 1:  # several equal ones for each rank
        most = max(len(rank[2]) for rank in ranks)
        assert most <= -(-len(momentum) // layout.world) + 7


def config_has_experts(fields: dict[str, Any]) -> bool:
    return "model.experts" in fields


def ranks_state(ranks: list[Any], name: str) -> set[str]:
    return set().union(*(rank[1].get(name, set()) for rank in ranks))


LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence=True, data=2, zero=1),
    Layout(pipeline=2, data=2, zero=3),
    Layout(data=2, zero=0),
    Layout(data=4, zero=2),
    Layout(context=2, mode="ring", tensor=2),
]
WIDE = [
    Layout(tensor=2),
    Layout(tensor=3, sequence=True),
    Layout(tensor=4),
    Layout(pipeline=2),
    Layout(tensor=2, pipeline=2, sequence=True, schedule="zb_h1"),
    *(Layout(data=2, zero=zero) for zero in (1, 2, 3)),
    *(Layout(data=4, zero=zero) for zero in (0, 1, 3)),
    *(Layout(tensor=2, data=2, zero=zero) for zero in (0, 2, 3)),
    *(Layout(pipeline=2, data=2, zero=zero) for zero in (0, 1, 2)),
    *(Layout(context=2, zero=zero) for zero in (0, 1, 2, 3)),
]
SPLIT = [
    *(Layout(data=2, expert=2, zero=zero) for zero in (0, 1, 2, 3)),
    *(Layout(tensor=2, data=2, expert=2, zero=zero) for zero in (0, 3)),
    Layout(pipeline=2, data=2, expert=2),
    Layout(data=4, expert=2, zero=3),
    Layout(data=2, expert=2, context=2, zero=1),
]
by_name = {"ids": lambda layout: layout.name}


@pytest.mark.parametrize("layout", LAYOUTS, **by_name)
def test_updates_are_those_of_whole_matrices(layout: Layout) -> None:
    compare_updates({}, layout)


@pytest.mark.parametrize("layout", [SPLIT[2], SPLIT[4]], **by_name)
def test_every_expert_is_a_matrix(layout: Layout) -> None:
    compare_updates(EXPERTS, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", WIDE, **by_name)
def test_updates_are_those_of_whole_matrices_in_all_layouts(layout: Layout) -> None:
    compare_updates({"model.tie_embeddings": True, "model.qk_norm": True}, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, *SPLIT], **by_name)
def test_every_expert_is_a_matrix_in_all_layouts(layout: Layout) -> None:
    compare_updates(EXPERTS | {"model.dense_layers": (0,)}, layout)


def agree(fields: dict[str, Any], layout: Layout) -> None:
    assert_trains_as_alone(Case.of(MUON | {"model.layers": 4} | fields), layout)


@pytest.mark.parametrize(
    "layout",
    [Layout(pipeline=2, schedule="zb_v"), Layout(tensor=2, sequence=True, pipeline=2), Layout(data=4, zero=3)],
    **by_name,
)
def test_eight_steps_are_those_of_one_process(layout: Layout) -> None:
    agree({}, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*LAYOUTS, *WIDE], **by_name)
def test_eight_steps_are_those_of_one_process_in_all_layouts(layout: Layout) -> None:
    if layout.tensor != 3:
        agree({}, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SPLIT, **by_name)
def test_eight_steps_with_experts_are_those_of_one_process(layout: Layout) -> None:
    agree(EXPERTS | {"model.dense_layers": (0,)}, layout)


def test_zero_levels_give_the_same_bits(pool: Pool) -> None:
    """With one micro-batch on two ranks; the tensor ranks' boxes and bf16 on the way included."""
    case = Case.of(MUON | {"train.micro_batch_size": 4, "train.precision": "bf16"}, steps=3)
    outcomes = [train(pool, case, Layout(tensor=2, data=2, zero=zero)) for zero in (0, 1, 2, 3)]
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])


# How the work is shared out


def shared_out(rank: int, case: Case, world: int, limit: int) -> list[list[list[str]]]:
    from megalite.optim import whole_matrices

    whole_matrices.ROUND_ELEMENTS = limit
    try:
        rule = build_trainer(case.config(world), rank, world).optimizer.rule
    finally:
        whole_matrices.ROUND_ELEMENTS = 1 << 24
    assert isinstance(rule, Muon)
    [whole] = rule._whole
    assert isinstance(whole, WholeMatrices)
    costs = [
        sum(newton_schulz_flops(whole.shapes[name], 5) for names in whole.plan for name in names[at]) for at in (0, 1)
    ]
    assert max(costs) < 1.2 * min(costs)
    for names in whole.plan:
        for mine in names:
            held = sum(whole.shapes[name][0] * whole.shapes[name][1] for name in mine)
            assert held <= limit or len(mine) == 1
    return whole.plan


@pytest.mark.parametrize("limit", [1, 800, 1500, 1 << 24])
def test_rounds_bound_what_a_worker_holds(pool: Pool, limit: int) -> None:
    case = Case.of(MUON).having(Layout(data=2, zero=3).fields)
    one, other = pool.run(shared_out, 2, case, 2, limit)
    assert one == other
    assert len({name for names in one for mine in names for name in mine}) == 21
    assert (len(one) == 1) == (limit == 1 << 24)
    assert limit > 1 or all(len(mine) <= 1 for names in one for mine in names)


# Checkpoints, refused steps

SECTIONS: support.Tables = {"optimizer": {"kind": "muon", "eps": 1e-5}}


KEPT = [
    support.Layout(),
    support.Layout(tensor=2, sequence=True, data=2, zero=2),
    support.Layout(pipeline=3, schedule="zb_h1"),
    support.Layout(tensor=3),
    support.Layout(data=4, zero=3),
    support.Layout(data=2, zero=0),
]


@pytest.mark.parametrize("layout", [KEPT[1], KEPT[4]], ids=["t2s-d2-z2", "d4-z3"])
def test_resumed_where_it_was_saved(pool: Pool, tmp_path: Path, layout: support.Layout) -> None:
    pool.run(support.resume, layout.world, layout, SECTIONS, str(tmp_path))


def walk(pool: Pool, folder: Path, layouts: list[support.Layout], **sections: Any) -> None:
    """What one layout saved, all others load, bitwise."""
    tables = SECTIONS | sections
    for number, source in enumerate(layouts):
        run = str(folder / str(number))
        saved = support.assemble(pool.run(support.save_trained, source.world, source, tables, run, 3 + number))
        kinds = {name: {kind for kind, other in saved if other == name} for _, name in saved}
        for name, kept in kinds.items():
            of_muon = "proj" in name or ".gate." in name
            assert kept - {"parameter", "weight"} == ({MOMENTUM} if of_muon else {"exp_avg", "exp_avg_sq"}), name
        for target in layouts:
            loaded = pool.run(support.load_all, target.world, target, tables, str(folder / "own"), [run])
            there = support.assemble([results[0][2] for results in loaded])
            assert there.keys() == saved.keys()
            assert all(torch.equal(there[key], saved[key]) for key in saved), (source, target)


def test_saved_in_one_layout_and_resumed_in_others(pool: Pool, tmp_path: Path) -> None:
    walk(pool, tmp_path, KEPT[:3])


@pytest.mark.slow
def test_saved_in_every_layout_and_resumed_in_all(pool: Pool, tmp_path: Path) -> None:
    walk(pool, tmp_path, KEPT)
    experts = {"experts": 6, "expert_ffn_hidden_size": 12, "shared_experts": 1}
    split = [support.Layout(), support.Layout(data=2, expert=2, zero=3), support.Layout(tensor=2, data=2, expert=2)]
    walk(pool, tmp_path / "experts", split, model=experts, train={"precision": "bf16"})


@pytest.mark.fast
@pytest.mark.parametrize(
    "saved, now, message",
    [("adamw", "muon", "no optimizer state momentum_buffer"), ("muon", "adamw", "no optimizer state of .*proj")],
)
def test_state_of_the_other_optimizer_is_refused(tmp_path: Path, saved: str, now: str, message: str) -> None:
    support.save_trained(0, support.Layout(), {"optimizer": {"kind": saved}}, str(tmp_path), 1)
    config = support.make_config(optimizer={"kind": now})
    trainer = support.make_trainer(config, support.Layout(), 0)
    with CheckpointManager(str(tmp_path / "own"), config, trainer.mesh) as manager:
        with pytest.raises(UserError, match=message):
            manager.load(trainer, str(tmp_path))
        manager.load(trainer, str(tmp_path), optimizer=False)


@pytest.mark.fast
def test_a_step_that_is_not_finite_changes_nothing() -> None:
    case = Case.of(MUON)
    config = case.config(1)
    trainer = build_trainer(config, 0, 1)
    batches = micro_batches(0, 8, config, trainer.mesh, False)
    assert trainer.step(batches, 1e-3).accepted
    with torch.no_grad():
        weight = trainer.stages[0].layers[0].feed_forward.down.weight
        kept = weight[0, 0].item()
        weight[0, 0] = torch.inf
        before = [segment.master.clone() for segment in trainer.segments]
        state = [value.clone() for segment in trainer.segments for value in segment.state.values()]
        assert not trainer.step(batches, 1e-3).accepted
        assert all(torch.equal(old, segment.master) for old, segment in zip(before, trainer.segments))
        now = [value for segment in trainer.segments for value in segment.state.values()]
        assert all(torch.equal(old, new) for old, new in zip(state, now, strict=True))
        weight[0, 0] = kept
    assert trainer.step(batches, 1e-3).accepted and trainer.optimizer.step_count == 2


@pytest.mark.fast
def test_clipping_scales_the_gradient_before_the_momentum() -> None:
    """A gradient a hundred times as large, clipped to the same norm, moves the weights as before."""
    ends = []
    for clip, factor in ((1e-3, 1.0), (1e-3, 100.0)):
        config = Case.of(MUON | {"optimizer.clip_grad": clip}).config(1)
        trainer = build_trainer(config, 0, 1, objective=Louder(factor))
        for step in range(3):
            batches = micro_batches(8 * step, 8, config, trainer.mesh, False)
            assert trainer.step(batches, 1e-2).grad_norm > clip
        ends.append({piece.box.name: torch.from_numpy(piece.values) for piece in pieces_of_weights(trainer)})
    assert max(distance(ends[0][name], ends[1][name]) for name in ends[0]) < 1e-4


class Louder:
    """Next-token prediction times a factor."""

    reads = "loss"
    metrics = ()

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def units(self, batch: Batch) -> Tensor:
        return (batch.labels_BS >= 0).sum() / self.factor

    def loss(self, outputs: Any, batch: Batch, scale: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs.loss, {}


class Cube(SwiGLU):
    """Has a matrix with three dimensions."""

    def __init__(self, build: Any, layer: int) -> None:
        super().__init__(build, layer)
        self.cube = build.replicated_parameter(f"model.layers.{layer}.cube", (2, 3, 4))


@pytest.mark.fast
def test_what_is_no_matrix_is_refused_by_name() -> None:
    case = Case.of(MUON | {"model.feed_forward": f"{__name__}:Cube"})
    with pytest.raises(UserError, match=r"cannot orthogonalise model.layers.\d.cube, which has 3 dimensions"):
        build_trainer(case.config(1), 0, 1)


@pytest.mark.fast
def test_the_matrices_have_a_rate_of_their_own() -> None:
    config = Case.of({"optimizer.kind": "muon", "optimizer.lr": 2e-3}).config(1)
    assert config.optimizer.muon_lr == 2e-3 and BASE["optimizer.lr"] != 2e-3
