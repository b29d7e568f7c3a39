"""What DeepSeek's families share: latent attention and fine-grained experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Fields, FileTensor, whole
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_HEADS,
    MOST_HIDDEN,
    MOST_LAYERS,
    decoder_tensors,
    even,
    read_decoder,
    write_decoder,
)
from megalite.model.families.sparse import (
    SPARSE_WITHOUT_EFFECT,
    mixed_stacked_tensors,
    mixed_tensors,
    read_shared_and_routed,
    shared_tensors,
)

DEEPSEEK_DEFAULTS: Mapping[str, Any] = {
    **{name: value for name, value in DEFAULTS.items() if name != "head_dim"},
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
DEEPSEEK_FIXED: Mapping[str, tuple[Any, ...]] = {
    **{name: values for name, values in FIXED.items() if "experts" not in name},
    "moe_layer_freq": (1,),
}
_OF_TRAINING = "says how the router is trained: model.aux_loss"
DEEPSEEK_WITHOUT_EFFECT = SPARSE_WITHOUT_EFFECT | {
    "qk_head_dim": "is the sum of qk_nope_head_dim and qk_rope_head_dim",
    "ep_size": "says how experts are split over devices",
    "aux_loss_alpha": _OF_TRAINING,
    "seq_aux": _OF_TRAINING,
}


def read_latent(fields: Fields, **features: Any) -> ModelConfig:
    """A decoder with latent attention and, after the first layers, experts; `features` as of `read_decoder`."""
    heads, plain = fields.count("num_attention_heads", MOST_HEADS), fields.count("qk_nope_head_dim", MOST_HEADS)
    rotated = even(fields, "qk_rope_head_dim", fields.count("qk_rope_head_dim", MOST_HEADS))
    if fields.given("head_dim") and fields.value("head_dim") != rotated:
        problem = f"is not qk_rope_head_dim = {rotated}, which is what transformers calls so here"
        raise fields.refusal("head_dim", fields.value("head_dim"), problem)
    kv_heads = fields.count("num_key_value_heads", MOST_HEADS, null=heads)
    if kv_heads != heads:
        problem = f"is not num_attention_heads = {heads}; in latent attention every head has keys of its own"
        raise fields.refusal("num_key_value_heads", kv_heads, problem)
    experts = read_shared_and_routed(fields, "n_routed_experts", "num_local_experts", "num_experts")
    dense = fields.count("first_k_dense_replace", MOST_LAYERS, least=0, null=0)
    layers = fields.count("num_hidden_layers", MOST_LAYERS)
    if dense >= layers:
        problem = f"leaves none of num_hidden_layers = {layers} for experts"
        raise fields.refusal("first_k_dense_replace", dense, problem)
    return read_decoder(
        fields,
        head_dim=plain + rotated,
        attention="mla",
        kv_lora_rank=fields.count("kv_lora_rank", MOST_HIDDEN),
        q_lora_rank=fields.count("q_lora_rank", MOST_HIDDEN, null=0),
        qk_nope_head_dim=plain,
        qk_rope_head_dim=rotated,
        v_head_dim=fields.count("v_head_dim", MOST_HEADS),
        dense_layers=tuple(range(dense)),
        **experts,
        **features,
    )


def write_latent(model: ModelConfig, **features: Any) -> dict[str, Any]:
    """The fields that `read_latent` reads, and further ones."""
    fields = write_decoder(
        model,
        attention_bias=False,
        kv_lora_rank=model.kv_lora_rank,
        q_lora_rank=model.q_lora_rank or None,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        n_routed_experts=model.experts,
        n_shared_experts=model.shared_experts or None,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_ffn_hidden_size,
        first_k_dense_replace=len(model.dense_layers),
        moe_layer_freq=1,
        routed_scaling_factor=model.router_scale,
        n_group=model.router_groups,
        topk_group=model.router_groups_per_token,
        **features,
    )
    del fields["head_dim"]  # follows from the parts, and means one of them in transformers
    return fields


def _attention(model: ModelConfig, layer: int) -> Iterator[FileTensor]:
    prefix, hidden, latent = f"model.layers.{layer}.self_attn.", model.hidden_size, model.kv_lora_rank
    if model.q_lora_rank:
        yield whole(f"{prefix}q_a_proj.weight", model.q_lora_rank, hidden)
        yield whole(f"{prefix}q_a_layernorm.weight", model.q_lora_rank)
        yield whole(f"{prefix}q_b_proj.weight", model.heads * model.head_dim, model.q_lora_rank)
    else:
        yield whole(f"{prefix}q_proj.weight", model.heads * model.head_dim, hidden)
    yield whole(f"{prefix}kv_a_proj_with_mqa.weight", latent + model.qk_rope_head_dim, hidden)
    yield whole(f"{prefix}kv_a_layernorm.weight", latent)
    yield whole(f"{prefix}kv_b_proj.weight", model.heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    yield whole(f"{prefix}o_proj.weight", hidden, model.heads * model.v_head_dim)


def _feed_forward(
    model: ModelConfig, layer: int, *, experts: Callable[[ModelConfig, int], Iterator[FileTensor]], bias: bool
) -> Iterator[FileTensor]:
    yield from experts(model, layer)
    if model.is_sparse(layer):
        yield from shared_tensors(model, layer, bias=bias)


def latent_tensors(model: ModelConfig, *, bias: bool, stacked: bool = False) -> Iterator[FileTensor]:
    """The tensors of the architecture; `bias`: routers have one. `stacked` as of `Family.stacked_tensors`."""
    experts = mixed_stacked_tensors if stacked else mixed_tensors
    feed_forward = functools.partial(_feed_forward, experts=experts, bias=bias)
    return decoder_tensors(model, attention=_attention, feed_forward=feed_forward)
