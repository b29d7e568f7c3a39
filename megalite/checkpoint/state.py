"""What checkpoints need of whatever trains: its place among the ranks, its shards, and quiet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megalite.mesh import Mesh
from megalite.optim.optimizer import Optimizer
from megalite.optim.shard import Segment


class Checkpointable(Protocol):
    """One or more models in training, of which this rank holds some boxes; the trainer is one.

    `segments` are those of all parameters, trained or frozen. What is saved is their master weights, and under its own
    name every tensor of their `state`.
    """

    @property
    def mesh(self) -> Mesh: ...

    @property
    def segments(self) -> Sequence[Segment]: ...

    @property
    def optimizer(self) -> Optimizer: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and global shapes of all tensors that a checkpoint of it holds."""
        ...

    def fresh_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of them that another run's checkpoint need not hold; they keep their initial values then."""
        ...

    def wait_for_all_gather(self) -> None:
        """Wait for parameters that are still being gathered."""
        ...

    def share(self) -> None:
        """The segments have new weights: round them into the parameters and give them to all ranks."""
        ...
