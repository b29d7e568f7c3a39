"""LoRA in every kind of layout and precision: gradients, updates, and the base, which stays as it is and is the
reference of a policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import AdapterConfig
from megalite.model.init import initial_values
from megalite.model.lora import LoRA, RankStabilisedLoRA
from megalite.placement import Placement, row_box
from megalite.train.trainer import Trainer
from tests.align import tiny
from tests.support.parity import (
    Case,
    Layout,
    Piece,
    assemble,
    assert_close,
    assert_same_bits,
    assert_trains_as_alone,
    build_trainer,
    micro_batches,
    pieces_of_weights,
    train_alone,
    train_virtually,
)

FIELDS: dict[str, Any] = {
    "adapter.kind": "lora",
    "adapter.rank": 3,
    "adapter.alpha": 5.0,
    "model.layers": 4,
    "train.global_batch_size": 8,
}
LAYOUTS = (
    Layout(tensor=2),
    Layout(tensor=2, sequence=True, pipeline=2, schedule="zb_h1"),
    Layout(pipeline=2, schedule="interleaved", data=2, zero=3),
)
MORE_LAYOUTS = (
    Layout(tensor=4, sequence=True),
    Layout(data=2, zero=0),
    Layout(data=4, zero=2),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(context=2, mode="ring", data=2, zero=2),
)


def case_of(**fields: Any) -> Case:
    return Case.of(FIELDS | fields, steps=3)


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)],
    ids=lambda layout: layout.name,
)
def test_gradients_and_updates_in_every_kind_of_layout(layout: Layout) -> None:
    """4 ranks share 3 key/value heads; biases, norms of heads and tied embeddings lie beside."""
    case = case_of(**({"model.attention_bias": True, "model.tie_embeddings": True} if layout.tensor > 1 else {}))
    assert_trains_as_alone(case, layout)


@pytest.mark.fast
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj"), ("o_proj", "gate_proj")])
def test_recomputation_changes_nothing(targets: tuple[str, ...]) -> None:
    case = case_of(**{"adapter.targets": targets, "model.layers": 2})
    kept = train_alone(case)
    for recompute in ("selective", "full"):
        assert_same_bits(train_alone(case.having({"train.recompute": recompute})), kept)


@pytest.mark.fast
def test_the_scale() -> None:
    config = AdapterConfig("lora", 16, 24.0)
    assert (LoRA(config).scale, RankStabilisedLoRA(config).scale) == (1.5, 6.0)


@pytest.mark.fast
def test_first_values_are_those_of_peft() -> None:
    """Uniform within 1 / sqrt(I), whatever the layout; B is zero."""
    trainer = build_trainer(case_of().config(1), 0, 1)
    for piece in pieces_of_weights(trainer):
        name, values = piece.box.name, torch.from_numpy(piece.values)
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(piece.box.shape[1])
            assert 0.8 * bound < values.abs().max() <= bound * (1 + 1e-6)
        elif name.endswith("lora_B.weight"):
            assert not values.any()
    box = row_box("a.lora_A.weight", (64, 4096), 0, 64, 0, (0,))
    drawn = initial_values(box, Placement((box,), "uniform", 0.5), 3)
    assert abs(float(drawn.std()) - 0.5) < 0.005 and abs(float(drawn.mean())) < 0.005
    assert float(drawn.abs().max()) <= 0.5 * math.sqrt(3) * (1 + 1e-6)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    pieces: list[Piece] = pieces_of_weights(trainer)
    return {f"{piece.box.name} {piece.box.offset}": torch.from_numpy(piece.values) for piece in pieces}


def assert_base_unchanged(before: dict[str, Tensor], after: dict[str, Tensor], trained: str = "lora_") -> None:
    for name, values in before.items():
        assert torch.equal(values, after[name]) == (trained not in name), name


BF16 = {"train.precision": "bf16", "model.hidden_size": 32, "model.ffn_hidden_size": 64, "model.heads": 4}
WIDE = {"model.kv_heads": 2, "model.head_dim": 16}


@pytest.mark.fast
@pytest.mark.parametrize("fp8", ["none", "tensor", "row"])
def test_a_base_in_bf16_and_fp8(fp8: str) -> None:
    """No bit of the base changes, and before the first step the policy has the scores of its base."""
    config = case_of(**BF16, **WIDE, **{"train.fp8": fp8, "adapter.rank": 8}).config(1)
    trainer = build_trainer(config, 0, 1)
    batches = micro_batches(0, 8, config, trainer.mesh, False)
    base, before = trainer.without_adapter(), weights_of(trainer)
    first = base.score(batches)
    assert torch.equal(torch.cat(trainer.score(batches)), torch.cat(first))
    losses = [trainer.step(batches, 3e-2).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    assert_base_unchanged(before, weights_of(trainer))
    then, now, policy = (torch.cat(scores) for scores in (first, base.score(batches), trainer.score(batches)))
    assert torch.equal(then, now) and not torch.equal(now, policy)


@pytest.mark.fast
def test_frozen_weights_have_neither_gradients_nor_optimizer_state() -> None:
    trainer = build_trainer(case_of(**BF16, **WIDE).config(1), 0, 1)
    for segment in trainer.segments:
        adapter = segment.bucket.role == "adapter"
        assert segment.bucket.trained == adapter == bool(segment.state) == (segment.gradient is not None)
        assert segment.master.dtype == (torch.float32 if adapter else torch.bfloat16)
        assert adapter or segment.master.data_ptr() == segment.bucket.parameters.data_ptr()
        assert all((slot.parameter.main_grad is not None) == adapter for slot in segment.bucket.slots)


EXPERTS = {"model.experts": 4, "model.dense_layers": (0,), "model.aux_loss": 0.01, "model.router_bias_rate": 0.01}


@pytest.mark.parametrize(
    "layout",
    [Layout(), pytest.param(Layout(tensor=2, sequence=True, data=2, expert=2, zero=3), marks=pytest.mark.slow)],
    ids=lambda layout: layout.name,
)
def test_beside_experts(layout: Layout) -> None:
    """Experts, routers and what has been learnt about their load stay as they are."""
    case = case_of(**EXPERTS)
    trainer = build_trainer(case.config(1), 0, 1)
    before, after = assemble([pieces_of_weights(trainer)], 1), train_alone(case)
    assert {name for name in before if "lora_" in name} == set(after.gradients)
    assert "model.layers.0.mlp.up_proj.lora_A.weight" in before
    assert not any("experts" in name for name in after.gradients)
    assert all("lora_" in name or torch.equal(values, after.weights[name]) for name, values in before.items())
    if layout.world > 1:
        assert_close(train_virtually(case, layout, chaos=True), after)


# Policies


def reinforce(rank: int, layout: Layout, kind: str) -> list[dict[str, float]]:
    adapter = {"kind": "lora", "rank": 4, "alpha": 16.0}
    rollout = {"prompts_per_step": 16, "answers": 2, "max_new_tokens": 8}
    config = tiny.config_of(layout, adapter=adapter, rollout=rollout, objective={"kind": kind}, policy={"epochs": 2})
    task = tiny.build_task(config, layout, rank)
    assert task._reference is not None and task._reference.model.segments is task.trainer.segments
    trainers = [task.trainer, *([task.critic] if task.critic else [])]
    before = [weights_of(trainer) for trainer in trainers]
    results = tiny.train(task, 2)
    for trainer, then in zip(trainers, before, strict=True):
        now = weights_of(trainer)
        for name, values in then.items():
            assert torch.equal(values, now[name]) == ("lora_" not in name and "score" not in name), name
    return [result.metrics for result in results]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2, sequence=True, data=2, zero=3)], ids=lambda layout: layout.name
)
def test_the_reference_of_a_policy_is_its_base(pool: Any, kind: str, layout: Layout) -> None:
    """Exactly equal before the first update, and not after; no copy is made."""
    for metrics in pool.run(reinforce, layout.world, layout, kind):
        assert metrics[0]["kl"] == metrics[0]["ratio_deviation"] == 0.0
        assert metrics[1]["kl"] != 0.0 and metrics[1]["ratio_deviation"] == 0.0


@pytest.mark.fast
def test_a_reward_models_score_is_trained_too() -> None:
    config = case_of(**{"objective.kind": "reward"}).config(1)
    trainer = build_trainer(config, 0, 1)
    trained = {slot.parameter.name for segment in trainer.optimizer.segments for slot in segment.bucket.slots}
    assert "score.weight" in trained and all("lora_" in name for name in trained - {"score.weight"})
