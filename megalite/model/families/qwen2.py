"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values. Fields and defaults: `Qwen2Config`."""

from __future__ import annotations

import functools
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.layer_types import read_windows, write_windows
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    derived_sizes,
    read_decoder,
    tied_output,
    write_decoder,
)

QWEN_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_qwen_windows(fields: Fields, used: bool | None = None) -> dict[str, Any]:
    """The window of each layer. Whether there is one is a field unless `used` says it."""
    used = fields.flag("use_sliding_window") if used is None else used
    first = fields.count("max_window_layers", MOST_POSITIONS, least=0)
    return read_windows(fields, lambda layer: layer >= first, used=used)


def write_qwen_windows(model: ModelConfig) -> dict[str, Any]:
    """The fields of the same, but for the flag."""
    first = next((layer for layer in range(model.layers) if model.slides(layer)), model.layers)
    return {"max_window_layers": first, **write_windows(model)}


def write_qwen(model: ModelConfig, **fields: Any) -> dict[str, Any]:
    return write_decoder(model, use_sliding_window=model.sliding_window > 0, **write_qwen_windows(model), **fields)


def _read(fields: Fields) -> ModelConfig:
    return read_decoder(fields, derived_sizes(fields), attention_bias=True, **read_qwen_windows(fields))


QWEN2 = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    defaults=QWEN_DEFAULTS | {"model_type": "qwen2"},
    fixed={**FIXED, "attention_bias": (True,)},
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=write_qwen,
    tensors=functools.partial(decoder_tensors, bias=True),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
