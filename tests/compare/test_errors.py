"""Errors put in at random places of a run are named at the operation that is wrong."""

from __future__ import annotations

import random

import pytest

from tests.compare.support import Error, Run, compare_pair
from tests.support.parity import BASE, Case, Layout

pytestmark = pytest.mark.slow

DENSE = Case.of({"optimizer.clip_grad": 0.05, "train.z_loss": 1e-3, "optimizer.weight_decay": 0.1}, steps=2)
EXPERTS = Case.of({"model.experts": 4, "model.experts_per_token": 2, "model.expert_ffn_hidden_size": 8}, steps=1)
T2, T2S, D2, P2 = Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(data=2), Layout(pipeline=2)
LAYER = "model.layers.{layer}"

CASES = {  # error: (layout of side B, operation, kind)
    "rope_turned": (P2, f"{LAYER}.self_attn forward", "activation"),
    "attention_scale": (D2, f"{LAYER}.self_attn forward", "activation"),
    "attention_window": (T2, f"{LAYER}.self_attn forward", "activation"),
    "attention_backward": (T2S, f"{LAYER}.self_attn backward", "activation_gradient"),
    "swiglu_forward": (T2, f"{LAYER}.mlp forward", "activation"),
    "swiglu_backward": (P2, f"{LAYER}.mlp backward", "activation_gradient"),
    "norm_eps": (T2S, f"{LAYER}.input_layernorm forward", "activation"),
    "norm_backward": (D2, f"{LAYER}.post_attention_layernorm backward", "activation_gradient"),
    "row_sum_missing": (T2, f"{LAYER}.self_attn.o_proj forward", "activation"),
    "column_gradient_sum_missing": (T2S, f"{LAYER}.mlp.gate_proj+up_proj backward", "activation_gradient"),
    "residual_scaled": (T2, f"{LAYER} forward", "activation"),
    "vocabulary_shifted": (T2, "model.embed_tokens forward", "activation"),
    "weight_gradient_doubled": (T2S, f"{LAYER}.mlp.down_proj backward", "gradient"),
    "norm_gradient_not_summed": (T2S, "model.norm backward", "gradient"),
    "gradient_reduction_missing": (D2, "model.layers.2.mlp.down_proj backward", "gradient"),
    "z_loss_missing": (P2, "lm_head forward", "loss"),
    "local_normalisation": (D2, "lm_head forward", "loss"),
    "head_gradient_not_summed": (T2, "lm_head backward", "activation_gradient"),
    "no_weight_decay": (D2, "optimizer", "weight"),
    "other_beta2": (T2, "optimizer", "optimizer_state"),
    "other_eps": (P2, "optimizer", "weight"),
    "step_count_from_zero": (T2S, "optimizer", "weight"),
    "norm_counts_replicas": (T2S, "gradient norm", "grad_norm"),
    "not_clipped": (D2, "optimizer", "optimizer_state"),
    "weights_not_gathered": (D2, "optimizer", "weight"),
    "warmup_too_early": (T2, "learning rate schedule", "lr"),
    "delayed_gradient_lost": (
        Layout(pipeline=2, schedule="zb_h1"),
        "model.layers.2.mlp.down_proj backward",
        "gradient",
    ),
    "stale_activation": (P2, "input of model.layers.", "activation"),
    "wrong_samples": (D2, "data", "input"),
    "queries_not_permuted": (T2, "initial weights", "weight"),
    "output_left_fresh": (P2, "initial weights", "weight"),
    "rows_of_another_rank": (Layout(context=2), "model.layers.0.self_attn forward", "activation"),
    "router_not_normalised": (Layout(data=2, expert=2), f"{LAYER}.mlp.gate forward", "activation"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_error_is_named_at_its_operation(pool, name):
    layout, operation, kind = CASES[name]
    layer = random.SystemRandom().randrange(BASE["model.layers"])
    case = EXPERTS if name == "router_not_normalised" else DENSE
    verdict = compare_pair(pool, Run(case), Run(case, layout), Error(name, layer))
    first = verdict.first
    assert first is not None, f"{name} in layer {layer} was not found"
    found = (first.port.kind, first.port.operation, first.port.name, first.port.step, first.ratio)
    assert first.port.kind == kind and first.port.operation.startswith(operation.format(layer=layer)), (layer, *found)
