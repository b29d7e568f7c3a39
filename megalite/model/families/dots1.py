"""dots.llm1: DeepSeek-V3's experts (small and shared ones, sigmoid scores with a bias, groups, first layers dense) over
Qwen 3's attention. Fields and defaults: `Dots1Config`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields, FileTensor
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_LAYERS,
    ROTARY_FREQUENCIES,
    decoder_tensors,
    derived_sizes,
    read_decoder,
    tied_output,
    write_decoder,
)
from megalite.model.families.qwen2 import read_qwen_windows, write_qwen_windows
from megalite.model.families.sparse import (
    SPARSE_WITHOUT_EFFECT,
    mixed_stacked_tensors,
    mixed_tensors,
    read_groups,
    read_shared_and_routed,
    shared_tensors,
)


def _read(fields: Fields) -> ModelConfig:
    experts = read_shared_and_routed(fields, "n_routed_experts", "num_local_experts")
    dense = fields.count("first_k_dense_replace", MOST_LAYERS, least=0, null=0)
    layers = fields.count("num_hidden_layers", MOST_LAYERS)
    return read_decoder(
        fields,
        derived_sizes(fields),
        qk_norm=True,
        **read_qwen_windows(fields, used=fields.value("sliding_window") is not None),
        dense_layers=tuple(range(min(dense, layers))),
        router="sigmoid",
        router_renormalise=fields.flag("norm_topk_prob"),
        **experts,
        **read_groups(fields),
    )


def _write(model: ModelConfig) -> dict[str, object]:
    return write_decoder(
        model,
        attention_bias=False,
        **write_qwen_windows(model),
        n_routed_experts=model.experts,
        n_shared_experts=model.shared_experts or None,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_ffn_hidden_size,
        first_k_dense_replace=len(model.dense_layers),
        norm_topk_prob=model.router_renormalise,
        routed_scaling_factor=model.router_scale,
        n_group=model.router_groups,
        topk_group=model.router_groups_per_token,
    )


def _feed_forward(
    model: ModelConfig, layer: int, experts: Callable[[ModelConfig, int], Iterator[FileTensor]]
) -> Iterator[FileTensor]:
    yield from experts(model, layer)
    if model.is_sparse(layer):
        yield from shared_tensors(model, layer)


def _tensors(model: ModelConfig, experts: Callable[[ModelConfig, int], Iterator[FileTensor]]) -> Iterator[FileTensor]:
    return decoder_tensors(model, qk_norm="head", feed_forward=functools.partial(_feed_forward, experts=experts))


DOTS1 = Family(
    model_type="dots1",
    architectures=("Dots1ForCausalLM", "Dots1Model"),
    defaults={
        **DEFAULTS,
        "model_type": "dots1",
        "vocab_size": 152064,
        "hidden_size": 4608,
        "intermediate_size": 10944,
        "num_hidden_layers": 62,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    fixed={name: values for name, values in FIXED.items() if "experts" not in name} | {"scoring_func": ("sigmoid",)},
    without_effect=SPARSE_WITHOUT_EFFECT | {"n_mtp": "counts layers for other heads than a language model's"},
    read=_read,
    write=_write,
    tensors=functools.partial(_tensors, experts=mixed_tensors),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
    stacked_tensors=functools.partial(_tensors, experts=mixed_stacked_tensors),
)
