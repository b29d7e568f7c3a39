"""LoRA (Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha / rank) B A x, where only A and B are trained.

S sequence, s its part outside tensor-parallel blocks, M micro-batch, I / O input and output features of the whole
layer, i / o this rank's share of them, r rank of the adapter.

    [adapter]
    kind = "lora:LoRA"
    rank = 8
    alpha = 16.0
    targets = ["q_proj", "v_proj"]     # all linear layers where empty
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from torch import Tensor, nn
from torch import cat as concatenate

from megalite.config import AdapterConfig
from megalite.model.build import Build
from megalite.parallel.linear import PLAIN, ColumnParallelLinear, RowParallelLinear
from megalite.placement import Box

ROLE = "adapter"


class LoRA:
    """Puts a pair of small matrices beside each linear layer that `adapter.targets` names."""

    def __init__(self, config: AdapterConfig) -> None:
        self.rank, self.scale, self.targets = config.rank, config.alpha / config.rank, config.targets

    def wants(self, name: str) -> bool:
        """Whether the layer with this global name, such as `model.layers.0.mlp.up_proj.weight`, gets an adapter."""
        return not self.targets or name.split(".")[-2] in self.targets

    def column(self, build: Build, name: str, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> nn.Module:
        if not any(self.wants(box.name) for box in boxes):
            return layer
        return LoRAColumn(self, build, layer, boxes)

    def row(self, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> nn.Module:
        return LoRARow(self, build, name, layer, columns) if self.wants(name) else layer


def _names(name: str) -> tuple[str, str]:
    stem = name.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


class LoRAColumn(nn.Module):
    """Around a column-parallel layer: x [s, M, I] -> [S, M, o].

    All tensor ranks hold A; B is cut by rows, exactly as the weight is. The weight may be several global tensors in
    one (queries, keys and values); each of them has an A and a B of its own, or none.
    """

    def __init__(self, lora: LoRA, build: Build, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> None:
        super().__init__()
        self.layer, self.scale = layer, lora.scale
        self.sizes: list[int] = []
        self.pairs = nn.ModuleList()
        for name, group in itertools.groupby(boxes, key=lambda box: box.name):
            mine = list(group)
            self.sizes.append(sum(box.size[0] for box in mine))
            self.pairs.append(self._pair(lora, build, name, mine) if lora.wants(name) else nn.Identity())

    def _pair(self, lora: LoRA, build: Build, name: str, boxes: list[Box]) -> nn.Module:
        (outputs, inputs), first, down, up = boxes[0].shape, boxes[0].local_offset[0], *_names(name)
        narrow = [
            dataclasses.replace(
                box,
                name=up,
                shape=(outputs, lora.rank),
                size=(box.size[0], lora.rank),
                local_offset=(box.local_offset[0] - first, 0),
            )
            for box in boxes
        ]
        weight = build.parameter(up, (self.sizes[-1], lora.rank), tuple(narrow), init="zeros", role=ROLE)
        return nn.Sequential(
            build.replicated(down, (lora.rank, inputs), std=1 / math.sqrt(inputs), role=ROLE),
            ColumnParallelLinear(weight, None, build.region, PLAIN),
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.layer(x).split(self.sizes, dim=-1)
        added = [
            part if isinstance(pair, nn.Identity) else part + self.scale * pair(x)
            for part, pair in zip(parts, self.pairs)
        ]
        return concatenate(added, dim=-1)


class LoRARow(nn.Module):
    """Around a row-parallel layer: x [S, M, i] -> [s, M, O]. A is cut by columns, as the weight; its small result is
    summed over the ranks, all of which hold B."""

    def __init__(self, lora: LoRA, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.scale = layer, lora.scale
        (outputs, inputs), (start, length), (down, up) = layer.weight.placement.boxes[0].shape, columns, _names(name)
        box = Box(down, (lora.rank, inputs), (0, start), (lora.rank, length), (0, 0), (build.mesh.rank,))
        weight = build.parameter(down, (lora.rank, length), (box,), std=1 / math.sqrt(inputs), role=ROLE)
        self.down = RowParallelLinear(weight, build.region, PLAIN)
        self.up = build.replicated(up, (outputs, lora.rank), init="zeros", role=ROLE)

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return self.layer(*inputs, **options) + self.scale * self.up(self.down(*inputs, **options))
