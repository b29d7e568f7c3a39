"""Gemma 3, the text model: Gemma 2 with normalised queries and keys instead of bounded scores, a window in five layers
out of six, and rotations of their own in those. Fields and defaults: `Gemma3TextConfig`."""

from __future__ import annotations

import functools
from typing import Any

from megalite.config import ModelConfig
from megalite.config.model import SLIDING
from megalite.model.families.family import Family, Fields
from megalite.model.families.gemma2 import (
    GEMMA_DEFAULTS,
    GEMMA_FIXED,
    GEMMA_WITHOUT_EFFECT,
    read_gemma,
    write_gemma,
)
from megalite.model.families.layer_types import read_windows
from megalite.model.families.llama import (
    MOST_LAYERS,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    SANDWICH_NORMS,
    decoder_tensors,
    tied_output,
)
from megalite.model.families.rotary import read_rotary_by_type

_LOCAL = "rope_local_base_freq"


def _read(fields: Fields) -> ModelConfig:
    pattern, typed = fields.count("sliding_window_pattern", MOST_LAYERS), fields.table("rope_parameters")
    windows = read_windows(fields, lambda layer: (layer + 1) % pattern != 0, needed=True)
    local_theta = fields.check_number(_LOCAL, fields.value(_LOCAL), above=1)
    positions = fields.count("max_position_embeddings", MOST_POSITIONS)
    rotary = read_rotary_by_type(fields, positions, local_theta, windows["sliding_window"] > 0)
    nested = (typed.get(SLIDING) or {}).get("rope_theta", local_theta)
    if fields.given(_LOCAL) and nested != local_theta:
        problem = f"contradicts rope_theta = {nested} in rope_parameters.{SLIDING}"
        raise fields.refusal(_LOCAL, local_theta, problem)
    return read_gemma(fields, qk_norm=True, **windows, **rotary)


def _write(model: ModelConfig) -> dict[str, Any]:
    return write_gemma(model, **{_LOCAL: model.rope_local_theta or model.rope_theta})


GEMMA3 = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    defaults=GEMMA_DEFAULTS
    | {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        _LOCAL: 10000.0,
        "sliding_window_pattern": 6,
    },
    # The architecture has the field, and transformers computes nothing with it.
    fixed=GEMMA_FIXED | {"attn_logit_softcapping": (None,)},
    without_effect=GEMMA_WITHOUT_EFFECT
    | {"_sliding_window_pattern": "says how layer_types was made, and is not read by this architecture"},
    read=_read,
    write=_write,
    tensors=functools.partial(decoder_tensors, qk_norm="head", norms=SANDWICH_NORMS),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
