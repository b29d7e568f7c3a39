"""The partition of layers into pipeline stages."""

from __future__ import annotations

import functools

from megalite.config import ModelConfig
from megalite.model.cost import output_in_layers
from megalite.placement import split_evenly


@functools.lru_cache(maxsize=4096)
def layers_of_stage(model: ModelConfig, stages: int, stage: int) -> range:
    """The global layer numbers of a stage.

    The last stage also computes the output layer, so it gets fewer layers: the number that minimises the cost of the
    slowest stage, counted in matrix elements (the embedding costs next to nothing). The remaining layers are split
    evenly, the first stages one longer if uneven. Every stage holds at least one layer.
    """
    if stages == 1:
        return range(model.layers)
    output = output_in_layers(model)

    def slowest(last: int) -> float:
        return max(-(-(model.layers - last) // (stages - 1)), last + output)

    last = min(range(1, max(2, model.layers - stages + 2)), key=lambda count: (slowest(count), -count))
    if stage == stages - 1:
        return range(model.layers - last, model.layers)
    first, length = split_evenly(model.layers - last, stages - 1, stage)
    return range(first, first + length)
