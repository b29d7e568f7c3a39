"""OLMo 2: norms after attention and feed-forward, and over all queries and all keys. Fields and defaults:
`Olmo2Config`."""

from __future__ import annotations

import functools
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    REORDERED_NORMS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    derived_sizes,
    read_decoder,
    tied_output,
    write_decoder,
)

OLMO_DEFAULTS = {**DEFAULTS, "vocab_size": 50304, "rms_norm_eps": 1e-5}


def read_olmo(fields: Fields, **features: Any) -> ModelConfig:
    """What OLMo 2 and 3 have in common, and further features."""
    return read_decoder(
        fields, derived_sizes(fields), block="reordered_norm", qk_norm=True, qk_norm_scope="all_heads", **features
    )


olmo_tensors = functools.partial(decoder_tensors, qk_norm="all_heads", norms=REORDERED_NORMS)

OLMO2 = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM", "Olmo2Model"),
    defaults=OLMO_DEFAULTS | {"model_type": "olmo2"},
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=read_olmo,
    write=lambda model: write_decoder(model, attention_bias=False),
    tensors=olmo_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
