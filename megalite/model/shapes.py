"""Names and shapes of a model's global tensors, without allocating anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from megalite.config import ModelConfig
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.build import Adapter
from megalite.model.decoder import Stage
from megalite.placement import placed_parameters


def local_shapes(stages: Iterable[nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and global shapes of all tensors that these stages hold boxes of."""
    return {
        box.name: box.shape
        for stage in stages
        for parameter in placed_parameters(stage)
        for box in parameter.placement.boxes
    }


def model_shapes(
    model: ModelConfig, *, head: str = "vocabulary", prefix: str = "", adapter: Adapter | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and global shapes of all tensors of a model."""
    short = dataclasses.replace(model, max_positions=1)  # the rotary table is not a parameter
    kernels = select_kernels({"default": "reference"}, torch.device("cpu"))
    mesh = Mesh(device=torch.device("meta"))
    return local_shapes([Stage(short, mesh, kernels, head=head, prefix=prefix, adapter=adapter)])
