"""Granite: a Llama with factors on embeddings, attention scores and what layers add, and a divisor of the logits.

Fields and defaults: `GraniteConfig`.
"""

from __future__ import annotations

from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    derived_sizes,
    read_decoder,
    tied_output,
    write_decoder,
)

_FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def _read(fields: Fields) -> ModelConfig:
    return read_decoder(fields, derived_sizes(fields), **{name: fields.number(name) for name in _FACTORS})


def _write(model: ModelConfig) -> dict[str, Any]:
    factors = {name: getattr(model, name) for name in _FACTORS}
    factors["attention_multiplier"] = model.attention_scale
    return write_decoder(model, attention_bias=False, mlp_bias=False, **factors)


GRANITE = Family(
    model_type="granite",
    architectures=("GraniteForCausalLM", "GraniteModel"),
    defaults={**DEFAULTS, "model_type": "granite", **dict.fromkeys(_FACTORS, 1.0)},
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=_write,
    tensors=decoder_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
