"""Ministral: a Mistral with the window in some of its layers. Fields and defaults: `MinistralConfig`."""

from __future__ import annotations

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.layer_types import read_windows, write_windows
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    read_decoder,
    tied_output,
    write_decoder,
)


def _read(fields: Fields) -> ModelConfig:
    return read_decoder(fields, (), **read_windows(fields, lambda layer: True))


MINISTRAL = Family(
    model_type="ministral",
    architectures=("MinistralForCausalLM", "MinistralModel"),
    defaults={
        **DEFAULTS,
        "model_type": "ministral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=lambda model: write_decoder(model, **write_windows(model)),
    tensors=decoder_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
