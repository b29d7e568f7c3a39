"""Mistral: a Llama with a sliding window, the same in every layer. Fields and defaults: `MistralConfig`."""

from __future__ import annotations

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    read_decoder,
    tied_output,
    write_decoder,
)


def _read(fields: Fields) -> ModelConfig:
    window = fields.count("sliding_window", MOST_POSITIONS, null=0)
    return read_decoder(fields, ("head_dim",), sliding_window=window)


MISTRAL = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    defaults={
        **DEFAULTS,
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=lambda model: write_decoder(model, sliding_window=model.sliding_window or None),
    tensors=decoder_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
