"""OLMo 3: OLMo 2 with a window in three layers out of four, whose rotations are not scaled. Fields and defaults:
`Olmo3Config`."""

from __future__ import annotations

from typing import Any

from megalite.config import ModelConfig
from megalite.config.model import FULL, SLIDING
from megalite.model.families.family import Family, Fields
from megalite.model.families.layer_types import read_windows, write_windows
from megalite.model.families.llama import (
    FIXED,
    MOST_POSITIONS,
    ROTARY_FREQUENCIES,
    WITHOUT_EFFECT,
    tied_output,
    write_decoder,
)
from megalite.model.families.olmo2 import OLMO_DEFAULTS, olmo_tensors, read_olmo
from megalite.model.families.rotary import read_rotary_by_type

_THETA = 500000.0


def _read(fields: Fields) -> ModelConfig:
    windows = read_windows(fields, lambda layer: (layer + 1) % 4 != 0, needed=True)
    typed, theta = fields.table("rope_parameters"), fields.value("rope_theta")
    if not typed.get(SLIDING) and theta != _THETA:
        problem = f"is read by transformers 5 as the base of {FULL} alone; give rope_parameters with a table for each"
        raise fields.refusal("rope_theta", theta, problem)
    positions = fields.count("max_position_embeddings", MOST_POSITIONS)
    rotary = read_rotary_by_type(fields, positions, _THETA, windows["sliding_window"] > 0)
    return read_olmo(fields, **windows, **rotary)


def _write(model: ModelConfig) -> dict[str, Any]:
    fields = write_decoder(model, attention_bias=False, **write_windows(model))
    local = model.rope_local_theta or model.rope_theta
    if (model.rope_theta, local) == (_THETA, _THETA):
        return fields
    full = fields["rope_scaling"] or {"rope_type": "default"}
    tables = {FULL: {"rope_theta": model.rope_theta, **full}, SLIDING: {"rope_theta": local, "rope_type": "default"}}
    return fields | {"rope_parameters": tables}


OLMO3 = Family(
    model_type="olmo3",
    architectures=("Olmo3ForCausalLM", "Olmo3Model"),
    defaults=OLMO_DEFAULTS | {"model_type": "olmo3", "rope_theta": _THETA, "sliding_window": 4096},
    fixed=FIXED,
    without_effect=WITHOUT_EFFECT,
    read=_read,
    write=_write,
    tensors=olmo_tensors,
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
)
