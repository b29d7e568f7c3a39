"""Gemma 2: norms before and after attention and feed-forward with weights around zero, bounded scores and logits, a
window in every other layer, scaled embeddings, GeGLU. Fields and defaults: `Gemma2Config`."""

from __future__ import annotations

import functools
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.layer_types import read_windows, write_windows
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_HIDDEN,
    ROTARY_FREQUENCIES,
    SANDWICH_NORMS,
    WITHOUT_EFFECT,
    decoder_tensors,
    read_decoder,
    require_multiple,
    tied_output,
    write_decoder,
)

_ACTIVATION = "gelu_pytorch_tanh"

GEMMA_FIXED = {
    **FIXED,
    "hidden_act": (_ACTIVATION,),
    "hidden_activation": (_ACTIVATION,),
    "use_bidirectional_attention": (False,),
}
GEMMA_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    "cache_implementation": "governs generation",
    "sliding_window_size": "repeats sliding_window, and is not read by this architecture",
}
GEMMA_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def read_gemma(fields: Fields, **features: Any) -> ModelConfig:
    """What Gemma 2 and 3 have in common, and further features."""
    model = read_decoder(
        fields,
        (),
        block="sandwich_norm",
        feed_forward="geglu",
        zero_centered_norm=True,
        embedding_multiplier=fields.count("hidden_size", MOST_HIDDEN) ** 0.5,
        attention_multiplier=fields.count("query_pre_attn_scalar", MOST_HIDDEN) ** -0.5,
        final_logit_softcapping=read_softcap(fields, "final_logit_softcapping"),
        **features,
    )
    return require_multiple(fields, model)


def read_softcap(fields: Fields, name: str) -> float:
    """A bound, 0 for null."""
    return 0.0 if fields.value(name) is None else fields.number(name)


def write_gemma(model: ModelConfig, **fields: Any) -> dict[str, Any]:
    return write_decoder(
        model,
        attention_bias=False,
        hidden_act=_ACTIVATION,
        hidden_activation=_ACTIVATION,
        query_pre_attn_scalar=round(model.attention_scale**-2),
        final_logit_softcapping=model.final_logit_softcapping or None,
        **write_windows(model),
        **fields,
    )


def _read(fields: Fields) -> ModelConfig:
    windows = read_windows(fields, lambda layer: layer % 2 == 0, needed=True)
    return read_gemma(fields, attn_logit_softcapping=read_softcap(fields, "attn_logit_softcapping"), **windows)


GEMMA2 = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    defaults=GEMMA_DEFAULTS | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    fixed=GEMMA_FIXED,
    without_effect=GEMMA_WITHOUT_EFFECT,
    read=_read,
    write=lambda model: write_gemma(model, attn_logit_softcapping=model.attn_logit_softcapping or None),
    tensors=functools.partial(decoder_tensors, norms=SANDWICH_NORMS),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
