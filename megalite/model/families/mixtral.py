"""Mixtral: a Mistral with experts in every layer. Fields and defaults: `MixtralConfig`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields, FileTensor
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    decoder_tensors,
    read_decoder,
    tied_output,
    write_decoder,
)
from megalite.model.families.sparse import (
    SPARSE_WITHOUT_EFFECT,
    expert_tensors,
    read_chosen,
    read_experts,
    stacked_expert_tensors,
)


def _read(fields: Fields) -> ModelConfig:
    window = fields.count("sliding_window", MOST_POSITIONS, null=0)
    experts = read_experts(fields, "num_local_experts", "num_experts")
    return read_decoder(
        fields,
        ("head_dim",),
        sliding_window=window,
        experts=experts,
        experts_per_token=read_chosen(fields, experts),
    )


def _write(model: ModelConfig) -> dict[str, object]:
    return write_decoder(
        model,
        sliding_window=model.sliding_window or None,
        intermediate_size=model.expert_ffn_hidden_size,
        num_local_experts=model.experts,
        num_experts_per_tok=model.experts_per_token,
    )


def _experts(model: ModelConfig, layer: int) -> Iterator[FileTensor]:
    return expert_tensors(model, layer, f"model.layers.{layer}.block_sparse_moe.", ("w1", "w3", "w2"))


MIXTRAL = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM", "MixtralModel"),
    defaults={
        **DEFAULTS,
        "model_type": "mixtral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    fixed={**FIXED, "router_jitter_noise": (0.0,)},
    without_effect=SPARSE_WITHOUT_EFFECT,
    read=_read,
    write=_write,
    tensors=functools.partial(decoder_tensors, feed_forward=_experts),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
    stacked_tensors=functools.partial(decoder_tensors, feed_forward=stacked_expert_tensors),
)
