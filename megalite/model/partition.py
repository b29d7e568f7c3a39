"""Which layers lie on which pipeline stage."""

from __future__ import annotations

from megalite.config import ModelConfig
from megalite.model.cost import output_in_layers
from megalite.placement import split_evenly


def layers_of_stage(model: ModelConfig, stages: int, stage: int) -> range:
    """The global numbers of the layers on a stage.

    The last stage also multiplies by the vocabulary, and holds as many layers fewer as makes the slowest stage fastest,
    counted in matrix elements; the embedding costs next to nothing. The others are even, the first ones one longer
    where they must be. Every stage holds a layer.
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
