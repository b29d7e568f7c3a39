"""What checkpoints need of whatever trains: its place among the ranks, its optimizer's shards, and quiet."""

from __future__ import annotations

from typing import Protocol

from megalite.config import Config
from megalite.mesh import Mesh
from megalite.optim.optimizer import Optimizer


class Checkpointable(Protocol):
    """A model in training, of which this rank holds some boxes; the trainer is one."""

    config: Config
    mesh: Mesh
    optimizer: Optimizer

    def settle(self) -> None:
        """Wait for parameters that are still being gathered."""
        ...
