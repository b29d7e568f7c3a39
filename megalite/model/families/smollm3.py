"""SmolLM3: a Llama of which some layers, by default every fourth, have no rotary positions. Fields and defaults:
`SmolLM3Config`."""

from __future__ import annotations

from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.family import Family, Fields
from megalite.model.families.layer_types import read_windows, write_windows
from megalite.model.families.llama import (
    DEFAULTS,
    FIXED,
    MOST_LAYERS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    decoder_tensors,
    derived_sizes,
    read_decoder,
    tied_output,
    write_decoder,
)


def _read_unrotated(fields: Fields) -> tuple[int, ...]:
    """The layers without rotations: their places in the file's list hold a 0, those of the others a 1."""
    layers, marks = fields.count("num_hidden_layers", MOST_LAYERS), fields.value("no_rope_layers")
    interval = fields.count("no_rope_layer_interval", MOST_LAYERS)
    if marks is None:
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(marks, list) or len(marks) < layers or any(type(mark) is not int for mark in marks):
        raise fields.refusal("no_rope_layers", marks, f"is not a list of a 0 or a 1 for each of {layers} layers")
    if any(mark not in (0, 1) for mark in marks):
        raise fields.refusal("no_rope_layers", marks, "has other numbers than 0 and 1")
    return tuple(layer for layer in range(layers) if not marks[layer])


def _read(fields: Fields) -> ModelConfig:
    unrotated, used = _read_unrotated(fields), fields.flag("use_sliding_window")
    windows = read_windows(fields, lambda layer: layer in unrotated, used=used)
    return read_decoder(fields, derived_sizes(fields), no_rope_layers=unrotated, **windows)


def _write(model: ModelConfig) -> dict[str, Any]:
    return write_decoder(
        model,
        attention_bias=False,
        mlp_bias=False,
        no_rope_layers=[int(layer not in model.no_rope_layers) for layer in range(model.layers)],
        use_sliding_window=model.sliding_window > 0,
        **write_windows(model),
    )


SMOLLM3 = Family(
    model_type="smollm3",
    architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
    defaults={
        **DEFAULTS,
        "model_type": "smollm3",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT | {"max_window_layers": "is not read by this architecture"},
    read=_read,
    write=_write,
    tensors=decoder_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
