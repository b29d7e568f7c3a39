"""Initial weights: the same global tensors from the same seed, in every layout.

A row's values depend on (seed, global name, row) alone, so every layout starts from the same model.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from megalite.placement import Box, PlacedParameter, Placement, placed_parameters

_UINT64 = (1 << 64) - 1


def _row_generator(seed: int, name: str, row: int) -> np.random.Generator:
    """A random stream that depends on (seed, name, row) alone: Philox, keyed by a hash of the first two and the row."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = np.array([int.from_bytes(digest[:8], "little"), row & _UINT64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def initial_values(box: Box, placement: Placement, seed: int) -> Tensor:
    """The initial fp32 values of a box; any split into boxes gives the same global tensor.

    Whole rows are drawn and then sliced, so that column-sharded weights agree too.
    """
    if placement.init not in ("normal", "uniform"):
        return torch.full(box.size, 1.0 if placement.init == "ones" else 0.0)
    width = box.shape[1]
    columns = slice(box.offset[1], box.offset[1] + box.size[1])
    values = np.empty(box.size, dtype=np.float32)
    for i in range(box.size[0]):
        generator = _row_generator(seed, box.name, box.offset[0] + i)
        if placement.init == "normal":
            row = generator.standard_normal(width, dtype=np.float32)
        else:  # of deviation 1 too
            row = (generator.random(width, dtype=np.float32) * 2 - 1) * np.float32(math.sqrt(3))
        values[i] = row[columns]
    return torch.from_numpy(values).mul_(placement.std)


@torch.no_grad()
def initialise_parameter(parameter: PlacedParameter, seed: int) -> None:
    """Fill a parameter with the initial values of its boxes; padding becomes zero."""
    parameter.zero_()
    for box in parameter.placement.boxes:
        box.view(parameter).copy_(initial_values(box, parameter.placement, seed))


def initialise(module: nn.Module, seed: int) -> None:
    """`initialise_parameter` for all parameters of a module."""
    for parameter in placed_parameters(module):
        initialise_parameter(parameter, seed)
