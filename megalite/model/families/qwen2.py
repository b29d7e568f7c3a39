"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values. Fields and defaults: `Qwen2Config`."""

from __future__ import annotations

import functools
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_LAYERS,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    read_decoder,
    tied_output,
    write_decoder,
)

FULL, SLIDING = "full_attention", "sliding_attention"

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


def read_window(fields: Fields, used: bool | None = None) -> int:
    """Tokens that a query sees, 0 for all; the same in every layer, or refused. Whether the window is `used` is a field
    unless it is given."""
    used = fields.flag("use_sliding_window") if used is None else used
    layers = fields.count("num_hidden_layers", MOST_LAYERS)
    size = fields.count("sliding_window", MOST_POSITIONS, least=int(used), null=0)
    window = size if used else 0
    first = fields.count("max_window_layers", MOST_POSITIONS, least=0)
    types = fields.value("layer_types")
    if types is None:
        types = [SLIDING if window and layer >= first else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise fields.refusal("layer_types", types, f"is not a list of {layers} times {FULL} or {SLIDING}")
    if any(kind != types[0] for kind in types):
        raise fields.refusal("layer_types", types, "is not supported; megalite's layers all have the same attention")
    if types[0] == FULL:
        return 0
    if not window:
        raise fields.refusal("layer_types", types, "contradicts use_sliding_window or sliding_window, which set none")
    return window


def write_qwen(model: ModelConfig, **fields: Any) -> dict[str, Any]:
    windowed = model.sliding_window > 0
    return write_decoder(
        model,
        use_sliding_window=windowed,
        sliding_window=model.sliding_window or None,
        max_window_layers=0 if windowed else model.layers,
        layer_types=[SLIDING if windowed else FULL] * model.layers,
        **fields,
    )


def _read(fields: Fields) -> ModelConfig:
    # The configuration class has no head_dim: absent it is derived, null it is an error.
    derived = ("num_key_value_heads",) if fields.given("head_dim") else ("num_key_value_heads", "head_dim")
    return read_decoder(fields, derived, attention_bias=True, sliding_window=read_window(fields))


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
