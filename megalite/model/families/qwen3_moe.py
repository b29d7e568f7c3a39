"""Qwen 3 with experts: Qwen 3's attention, some layers dense where the file says so. Fields and defaults:
`Qwen3MoeConfig`."""

from __future__ import annotations

import functools

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_FFN,
    MOST_LAYERS,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    decoder_tensors,
    read_decoder,
    tied_output,
    write_decoder,
)
from megalite.model.families.sparse import (
    SPARSE_WITHOUT_EFFECT,
    mixed_stacked_tensors,
    mixed_tensors,
    read_chosen,
    read_experts,
)


def _read(fields: Fields) -> ModelConfig:
    used = fields.flag("use_sliding_window")
    window = fields.count("sliding_window", MOST_POSITIONS, least=int(used), null=0)
    experts = read_experts(fields, "num_local_experts", "num_experts")
    layers = fields.count("num_hidden_layers", MOST_LAYERS)
    only, step = fields.layers("mlp_only_layers", layers), fields.count("decoder_sparse_step", MOST_LAYERS)
    derived = () if fields.given("head_dim") else ("head_dim",)
    return read_decoder(
        fields,
        derived,
        qk_norm=True,
        sliding_window=window if used else 0,
        experts=experts,
        experts_per_token=read_chosen(fields, experts),
        expert_ffn_hidden_size=fields.count("moe_intermediate_size", MOST_FFN),
        dense_layers=tuple(layer for layer in range(layers) if layer in only or (layer + 1) % step),
        router_renormalise=fields.flag("norm_topk_prob"),
    )


def _write(model: ModelConfig) -> dict[str, object]:
    return write_decoder(
        model,
        attention_bias=False,
        use_sliding_window=model.sliding_window > 0,
        sliding_window=model.sliding_window or None,
        num_experts=model.experts,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_ffn_hidden_size,
        decoder_sparse_step=1,
        mlp_only_layers=list(model.dense_layers),
        norm_topk_prob=model.router_renormalise,
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    defaults={
        **DEFAULTS,
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
    },
    fixed={name: values for name, values in FIXED.items() if "experts" not in name},
    without_effect=SPARSE_WITHOUT_EFFECT | {"max_window_layers": "is not read by this architecture"},
    read=_read,
    write=_write,
    tensors=functools.partial(decoder_tensors, qk_norm="head", feed_forward=mixed_tensors),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
    stacked_tensors=functools.partial(decoder_tensors, qk_norm="head", feed_forward=mixed_stacked_tensors),
)
