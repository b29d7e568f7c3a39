"""The adapter that a configuration names, checked against the layers that the model has."""

from __future__ import annotations

import dataclasses
import functools

from torch import nn

from megalite.config import Config, ModelConfig
from megalite.errors import UserError
from megalite.model.block import build_block
from megalite.model.build import Adapter, Build, layer_name, make_adapter
from megalite.model.cost import meta_build
from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalite.placement import Box


def build_adapter(config: Config) -> Adapter | None:
    """The adapter of `adapter.kind`; None for `none`. Raises `UserError` for targets that the model does not have."""
    if config.adapter.kind == "none":
        return None
    known = linear_layers(config.model)
    for target in config.adapter.targets:
        if target not in known:
            raise UserError(
                f"adapter.targets names {target!r}, and no layer that takes an adapter is called so; "
                f"use some of {', '.join(known)}"
            )
    return make_adapter(config.adapter)


@functools.lru_cache(maxsize=64)
def linear_layers(model: ModelConfig) -> tuple[str, ...]:
    """The names of the linear layers that take an adapter, as `q_proj`, in the order of their use."""
    names = _Names()
    build = dataclasses.replace(meta_build(model), adapter=names)
    for sparse in (False, True):
        layer = next((number for number in range(model.layers) if model.is_sparse(number) is sparse), None)
        if layer is not None:
            build_block(build, layer)
    return tuple(dict.fromkeys(names.found))


class _Names:
    """An adapter that leaves every layer as it is and notes its name."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def column(self, build: Build, name: str, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> nn.Module:
        self.found += [layer_name(box.name) for box in boxes]
        return layer

    def row(self, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> nn.Module:
        self.found.append(layer_name(name))
        return layer
