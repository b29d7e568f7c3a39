"""Tables of layers in a `config.json`: which layers see a window of tokens, and which have no rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megalite.config import ModelConfig
from megalite.config.model import FULL, SLIDING
from megalite.model.families.family import Fields
from megalite.model.families.llama import MOST_LAYERS, MOST_POSITIONS


def read_windows(
    fields: Fields, slides: Callable[[int], bool], *, used: bool = True, needed: bool = False
) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of `ModelConfig`.

    `slides` says which layers have the window where the file has no `layer_types`. Unless it is `used`, there is no
    window, whatever its size. A null size means that no layer has one, or is refused where it is `needed` by those.
    """
    layers = fields.count("num_hidden_layers", MOST_LAYERS)
    size = fields.count("sliding_window", MOST_POSITIONS, least=int(used), null=0)
    window = size if used else 0
    types = fields.value("layer_types")
    if types is None:
        types = [SLIDING if (window or needed) and slides(layer) else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise fields.refusal("layer_types", types, f"is not a list of {layers} times {FULL} or {SLIDING}")
    if SLIDING not in types:
        return {"sliding_window": 0}
    if not window:
        raise fields.refusal("layer_types", types, "contradicts use_sliding_window or sliding_window, which set none")
    return {"sliding_window": window, "layer_types": tuple(types)}


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The fields that `read_windows` reads."""
    types = [SLIDING if model.slides(layer) else FULL for layer in range(model.layers)]
    return {"sliding_window": model.sliding_window or None, "layer_types": types}
