"""Llama 2, 3 and 3.x; also what the other families of the same arithmetic share.

Fields and defaults: `LlamaConfig` of transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields, FileTensor, whole
from megalite.model.families.rotary import read_rotary, write_rotary

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

# Larger values are no model that fits any machine; the table of rotations alone takes 8 bytes a position and channel.
MOST_LAYERS, MOST_HEADS, MOST_POSITIONS = 1 << 12, 1 << 16, 1 << 24
MOST_HIDDEN, MOST_FFN, MOST_VOCABULARY = 1 << 24, 1 << 26, 1 << 28

# Fields that make a layer compute something else, and the values of them that megalite computes.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "logit_scale": (1.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "per_layer_config": ({},),
}

_REASONS: Mapping[str, tuple[str, ...]] = {
    "what the weights are stored in, not what the model is": ("dtype", "torch_dtype"),
    "draws initial weights, which are loaded here": ("initializer_range",),
    "splits products into sums, with the same result": ("pretraining_tp", "chunk_size_feed_forward"),
    "names tokens": (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        "tokenizer_class",
        "prefix",
    ),
    "says what to return": (
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "tie_last_hidden_states",
        "use_cache",
    ),
    "says who wrote the file, or how to run it": (
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "_flash_attn_2_enabled",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "unsloth_fixed",
        "unsloth_version",
    ),
    "names code beside the file, which transformers does not take where it has its own": ("auto_map",),
    "belongs to other heads than a language model's": (
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
    ),
    "belongs to encoders with decoders": (
        "is_decoder",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "pruned_heads",
    ),
    "governs generation": (
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "do_sample",
        "max_length",
        "min_length",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "diversity_penalty",
        "length_penalty",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "early_stopping",
        "remove_invalid_values",
        "output_scores",
        "return_dict_in_generate",
    ),
}
WITHOUT_EFFECT = {name: reason for reason, names in _REASONS.items() for name in names}

# Old exports carry the rotary frequencies, which follow from the configuration; transformers leaves them out, too.
ROTARY_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

DEFAULTS: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def read_decoder(
    fields: Fields, derived: Collection[str] = ("num_key_value_heads", "head_dim"), **features: Any
) -> ModelConfig:
    """A decoder of the Llama kind; `features` are the fields of `ModelConfig` in which a family differs from Llama.

    Null in a field out of `derived` means what follows from heads and hidden size, elsewhere it is an error: as in the
    family's configuration class.
    """
    hidden, heads = fields.count("hidden_size", MOST_HIDDEN), fields.count("num_attention_heads", MOST_HEADS)
    kv_heads = fields.count("num_key_value_heads", MOST_HEADS, null=heads if "num_key_value_heads" in derived else None)
    if "head_dim" not in features:
        null = hidden // heads if "head_dim" in derived else None
        features["head_dim"] = even(fields, "head_dim", fields.count("head_dim", MOST_HEADS, null=null))
    if heads % kv_heads:
        raise fields.refusal("num_key_value_heads", kv_heads, f"does not divide num_attention_heads = {heads}")
    positions = fields.count("max_position_embeddings", MOST_POSITIONS)
    if "rope_theta" not in features:
        features["rope_theta"], features["rope_scaling"] = read_rotary(fields, positions)
    return ModelConfig(
        layers=fields.count("num_hidden_layers", MOST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=fields.count("intermediate_size", MOST_FFN),
        heads=heads,
        kv_heads=kv_heads,
        vocab_size=fields.count("vocab_size", MOST_VOCABULARY),
        max_positions=positions,
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        **features,
    )


def even(fields: Fields, name: str, width: int) -> int:
    """`width`, the value of field `name`, if rotations can turn so many channels."""
    if width == 0 or width % 2:
        raise fields.refusal(name, width, "is not an even number above 0; rotations need pairs of channels")
    return width


def derived_sizes(fields: Fields) -> tuple[str, ...]:
    """`derived` of `read_decoder` where the configuration class has no head_dim: absent it is derived, null it is an
    error."""
    return ("num_key_value_heads",) if fields.given("head_dim") else ("num_key_value_heads", "head_dim")


def write_decoder(model: ModelConfig, **fields: Any) -> dict[str, Any]:
    """The fields that all families of this kind have, and further ones."""
    return {
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_positions,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **write_rotary(model),
        **fields,
    }


def dense_tensors(model: ModelConfig, layer: int) -> Iterator[FileTensor]:
    """The feed-forward part of a layer."""
    return gated_tensors(f"model.layers.{layer}.mlp.", model.hidden_size, model.ffn_hidden_size)


def gated_tensors(prefix: str, hidden: int, width: int) -> Iterator[FileTensor]:
    """The three matrices of a gated feed-forward layer."""
    yield whole(f"{prefix}gate_proj.weight", width, hidden)
    yield whole(f"{prefix}up_proj.weight", width, hidden)
    yield whole(f"{prefix}down_proj.weight", hidden, width)


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
REORDERED_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def attention_tensors(
    model: ModelConfig, layer: int, *, bias: bool = False, qk_norm: Literal["", "head", "all_heads"] = ""
) -> Iterator[FileTensor]:
    """Grouped-query attention of a layer; `qk_norm` says what a norm of queries or keys spans."""
    hidden, prefix = model.hidden_size, f"model.layers.{layer}.self_attn."
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield whole(f"{prefix}{name}.weight", rows, hidden)
        if bias:
            yield whole(f"{prefix}{name}.bias", rows)
    if qk_norm:
        yield whole(f"{prefix}q_norm.weight", queries if qk_norm == "all_heads" else model.head_dim)
        yield whole(f"{prefix}k_norm.weight", keys if qk_norm == "all_heads" else model.head_dim)
    yield whole(f"{prefix}o_proj.weight", hidden, queries)


def decoder_tensors(
    model: ModelConfig,
    *,
    bias: bool = False,
    qk_norm: Literal["", "head", "all_heads"] = "",
    norms: tuple[str, ...] = PRE_NORMS,
    attention: Callable[[ModelConfig, int], Iterator[FileTensor]] | None = None,
    feed_forward: Callable[[ModelConfig, int], Iterator[FileTensor]] = dense_tensors,
) -> Iterator[FileTensor]:
    """The tensors of the architecture, in the order of the model: from the numbers alone, not from megalite's layers,
    so that what those have beyond it is found. `norms` are those of a layer; `attention` lists the tensors of its first
    part, by default `attention_tensors` with `bias` and `qk_norm`, and `feed_forward` those of its second."""
    attention = attention or functools.partial(attention_tensors, bias=bias, qk_norm=qk_norm)
    yield whole(EMBEDDING, model.vocab_size, model.hidden_size)
    for layer in range(model.layers):
        for norm in norms:
            yield whole(f"model.layers.{layer}.{norm}.weight", model.hidden_size)
        yield from attention(model, layer)
        yield from feed_forward(model, layer)
    yield whole("model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        yield whole(OUTPUT, model.vocab_size, model.hidden_size)


def tied_output(model: ModelConfig) -> dict[str, str]:
    """A tied output layer may be stored a second time."""
    return {OUTPUT: EMBEDDING} if model.tie_embeddings else {}


def require_multiple(fields: Fields, model: ModelConfig) -> ModelConfig:
    """The model, unless its hidden size is no multiple of its heads: some architectures refuse that, whatever their
    head_dim."""
    if model.hidden_size % model.heads:
        raise fields.refusal("hidden_size", model.hidden_size, f"is no multiple of num_attention_heads = {model.heads}")
    return model


def _read(fields: Fields) -> ModelConfig:
    return require_multiple(fields, read_decoder(fields))


LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    defaults=DEFAULTS,
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=lambda model: write_decoder(model, attention_bias=False, mlp_bias=False),
    tensors=decoder_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
