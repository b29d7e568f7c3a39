"""Qwen 3 (dense): normalised queries and keys, a head size of its own. Fields and defaults: `Qwen3Config`."""

from __future__ import annotations

import functools

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import (
    FIXED,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    read_decoder,
    tied_output,
)
from megalite.model.families.qwen2 import QWEN_DEFAULTS, read_qwen_windows, write_qwen


def _read(fields: Fields) -> ModelConfig:
    return read_decoder(fields, ("num_key_value_heads",), qk_norm=True, **read_qwen_windows(fields))


QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    defaults=QWEN_DEFAULTS | {"model_type": "qwen3", "head_dim": 128},
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=lambda model: write_qwen(model, attention_bias=False),
    tensors=functools.partial(decoder_tensors, qk_norm="head"),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
