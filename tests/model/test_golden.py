"""The decoder computes what Hugging Face's transformers computes: logits, gradients, greedy tokens, training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.model.decoder import Stage
from megalite.placement import placed_parameters
from tests.fixtures import golden
from tests.fixtures.make_huggingface import probe_signs
from tests.support.virtual import World

TOLERANCE = 2e-5
"""Absolute, on logits with a standard deviation of 1 to 2; two attention forms of transformers differ by as much."""


@pytest.fixture(params=golden.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _logits(stage: Stage, ids_BS: torch.Tensor) -> torch.Tensor:
    return stage.logits(stage(ids_BS, stage.positions(ids_BS.shape[1]))).transpose(0, 1)


@pytest.mark.fast
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_logits(name: str, kernels: str) -> None:
    expected = golden.golden(name)
    logits_BSV = _logits(golden.whole_model(name, kernels), expected["input_ids"])
    assert (logits_BSV - expected["logits"]).abs().max() < TOLERANCE


@pytest.mark.fast
def test_gradients(name: str) -> None:
    """Norm, and inner products with four sign vectors, of every parameter's gradient; a tied weight's is the sum."""
    expected, stage = golden.golden(name), golden.whole_model(name)
    batch = golden.next_token_batch(expected["input_ids"])
    hidden = stage(batch.tokens_BS, stage.positions(batch.tokens_BS.shape[1]))
    valid = int((batch.labels_BS >= 0).sum())
    loss = stage.loss(hidden, batch.labels_BS, 1 / valid)
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for parameter in placed_parameters(stage):
        for box in parameter.placement.boxes if parameter.requires_grad else ():
            whole = gradients.setdefault(box.name, torch.zeros(box.shape, dtype=torch.float64))
            assert parameter.grad is not None
            box.of(whole).add_(box.view(parameter.grad))
    gradients = golden.as_in_memory(name, gradients)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert len(gradients) == len(expected["grad_norm"])
    for index, (parameter_name, gradient) in enumerate(sorted(gradients.items())):
        norm = expected["grad_norm"][index]
        assert gradient.norm().item() == pytest.approx(norm.item(), rel=1e-5), parameter_name
        signs = torch.from_numpy(probe_signs(parameter_name, gradient.numel()))
        error = ((signs @ gradient.flatten()) - expected["grad_probe"][index]).abs().max()
        assert error < 1e-5 * norm * gradient.numel() ** 0.5, parameter_name


@pytest.mark.fast
@pytest.mark.parametrize("name", ["granite_factors", "gemma2_softcaps"])
def test_log_probabilities_have_the_gradients_of_the_loss(name: str) -> None:
    """Scaled and bounded logits, made again in backward: the loss is minus the sum of the labels' log-probabilities."""
    batch, gradients = golden.next_token_batch(golden.golden(name)["input_ids"]), []
    for way in ("loss", "logprobs"):
        stage = golden.whole_model(name)
        hidden = stage(batch.tokens_BS, stage.positions(batch.tokens_BS.shape[1]))
        if way == "loss":
            stage.loss(hidden, batch.labels_BS, 1.0).backward()
        else:
            (-stage.logprobs(hidden, batch.labels_BS).sum()).backward()
        gradients.append([parameter.grad for parameter in placed_parameters(stage)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.fast
def test_greedy_tokens(name: str) -> None:
    """Twenty tokens, each from a forward pass over all before it."""
    expected, stage = golden.golden(name), golden.whole_model(name)
    ids_BS = expected["prompts"]
    while ids_BS.shape[1] < expected["greedy"].shape[1]:
        ids_BS = torch.cat([ids_BS, _logits(stage, ids_BS)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids_BS, expected["greedy"])


YARN_WITHOUT_MSCALES = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3_gqa", {"rope_scaling": {}}),
        ("llama_yarn", {"rope_scaling": {}}),
        ("llama_yarn", {"rope_scaling": {"type": "yarn", "factor": 4.5, "original_max_position_embeddings": 32}}),
        ("llama3_gqa", {"rope_theta": 5.5e5}),
        ("mistral_swa", {"sliding_window": 8}),
        ("mistral_swa", {"sliding_window": 0}),
        ("qwen3_qknorm", {"norm_eps": 1e-5}),
        ("qwen2_bias", {"rope_theta": 1.1e6}),
        ("mixtral_experts", {"router_renormalise": False}),
        ("mixtral_experts", {"experts_per_token": 3}),
        ("qwen3_experts", {"router_renormalise": True}),
        ("dots1_experts", {"router_scale": 1.6}),
        ("dots1_experts", {"router_groups": 2, "router_groups_per_token": 1}),
        ("olmo3_windows", {"sliding_window": 7}),
        ("olmo3_windows", {"layer_types": ("sliding_attention", "full_attention") * 2}),
        ("olmo3_windows", {"rope_local_theta": 0.0}),
        ("phi3_fused", {"sliding_window": 8}),
        ("granite_factors", {"embedding_multiplier": 12.1}),
        ("granite_factors", {"attention_multiplier": 0.0}),
        ("granite_factors", {"residual_multiplier": 0.23}),
        ("granite_factors", {"logits_scaling": 3.01}),
        ("smollm3_unrotated", {"no_rope_layers": (1,)}),
        ("smollm3_unrotated", {"sliding_window": 8}),
        ("gemma2_softcaps", {"attn_logit_softcapping": 2.1}),
        ("gemma2_softcaps", {"final_logit_softcapping": 3.1}),
        ("gemma2_softcaps", {"attention_multiplier": 0.0}),
        ("gemma2_softcaps", {"feed_forward": "swiglu"}),
        ("gemma2_softcaps", {"zero_centered_norm": False}),
        ("gemma2_softcaps", {"embedding_multiplier": 4.9}),
        ("gemma2_softcaps", {"layer_types": ("full_attention", "sliding_attention") * 2}),
        ("gemma3_two_bases", {"rope_local_theta": 1.1e4}),
        ("gemma3_two_bases", {"rope_theta": 1.1e6}),
        ("gemma3_two_bases", {"rope_scaling": {}}),
        ("deepseek2_experts", {"rope_interleave": False}),
        ("deepseek2_experts", {"router_groups": 1, "router_groups_per_token": 1}),
        ("deepseek2_experts", {"router_renormalise": True}),
        ("deepseek3_experts", {"rope_interleave": False}),
        ("deepseek3_experts", {"attention_multiplier": 13**-0.5}),
        ("deepseek3_experts", {"rope_scaling": YARN_WITHOUT_MSCALES}),
    ],
)
def test_a_wrong_field_shows(name: str, change: dict[str, Any]) -> None:
    """The golden logits tell a slightly different model from the right one: the tests above have teeth."""
    with HuggingFaceSource(golden.folder(name)) as source:
        wrong = dataclasses.replace(source.model, **change)
    expected = golden.golden(name)
    logits_BSV = _logits(golden.whole_model(name, model=wrong), expected["input_ids"])
    assert (logits_BSV - expected["logits"]).abs().max() > 3 * TOLERANCE


LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "tensor 2, whole sequences": {"tensor": 2, "sequence": False},
    "pipeline 2": {"pipeline": 2},
    "data 2, zero": {"zero": 1},
    "tensor 2, pipeline 2": {"tensor": 2, "pipeline": 2},
    "pipeline 2, data 2": {"pipeline": 2},
    "expert 2": {"expert": 2},
}
WORLD_SIZES = {"one process": 1, "tensor 2, pipeline 2": 4, "pipeline 2, data 2": 4}


def _names(layout: str) -> list[str]:
    """The models that the layout fits."""
    return [name for name in golden.NAMES if layout != "expert 2" or name.endswith("_experts")]


def _train(name: str, layout: str) -> list[list[tuple[float, float]]]:
    size = WORLD_SIZES.get(layout, 2)
    return World(size).run(lambda rank, make: golden.train(rank, size, name, make, **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_follows_transformers(layout: str) -> None:
    """Eight clipped AdamW steps from the same weights on the same tokens, in any layout."""
    for name in _names(layout):
        expected = golden.golden(name)
        for steps in _train(name, layout):
            losses, norms = zip(*steps)
            torch.testing.assert_close(torch.tensor(losses), expected["train_loss"].float(), rtol=2e-5, atol=0)
            torch.testing.assert_close(torch.tensor(norms), expected["train_norm"].float(), rtol=2e-4, atol=0)
