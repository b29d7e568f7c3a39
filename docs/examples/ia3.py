"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): y = l * (W x), where only the vector l is trained.

S sequence, s its part outside tensor-parallel blocks, M micro-batch, I / O input and output features of the whole
layer, i / o this rank's share of them.

    [adapter]
    kind = "ia3:IA3"
    targets = ["k_proj", "v_proj", "down_proj"]     # all linear layers where empty
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config import AdapterConfig
from megalite.model.build import Build
from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalite.placement import Box, PlacedParameter

ROLE = "adapter"


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.ia3_l"


class IA3:
    """Scales the outputs of each linear layer that `adapter.targets` names."""

    def __init__(self, config: AdapterConfig) -> None:
        self.targets = config.targets

    def wants(self, name: str) -> bool:
        """Whether the layer with this global name, such as `model.layers.0.mlp.up_proj.weight`, gets an adapter."""
        return not self.targets or name.split(".")[-2] in self.targets

    def column(self, build: Build, name: str, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> nn.Module:
        """The weight may be several global tensors in one (queries, keys and values): l is cut by rows as it is, and
        has one box for each of its boxes that is wanted."""
        wanted = [box for box in boxes if self.wants(box.name)]
        if not wanted:
            return layer
        narrow, places, length = [], [], 0
        for box in wanted:
            size = box.size[0]
            parts = {field: getattr(box, field)[:1] for field in ("shape", "offset", "size")}
            narrow.append(dataclasses.replace(box, name=_scale_name(box.name), local_offset=(length,), **parts))
            places.append(torch.arange(box.local_offset[0], box.local_offset[0] + size))
            length += size
        scale = build.parameter(narrow[0].name, (length,), tuple(narrow), init="ones", role=ROLE)
        rows = None if length == len(layer.weight) else torch.cat(places).to(build.mesh.device)
        return Scaled(layer, scale, rows)

    def row(self, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> nn.Module:
        """All ranks hold l: each scales its own tokens after the sum."""
        if not self.wants(name):
            return layer
        outputs = layer.weight.placement.boxes[0].shape[0]
        return Scaled(layer, build.replicated_parameter(_scale_name(name), (outputs,), init="ones", role=ROLE))


class Scaled(nn.Module):
    """Around a linear layer: its outputs times `scale`, all of them or those of these `rows` of the weight."""

    def __init__(self, layer: nn.Module, scale: PlacedParameter, rows: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        output = self.layer(*inputs, **options)
        if self.rows is None:
            return output * self.scale
        factors = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
        return output * factors.index_copy(0, self.rows, self.scale)
