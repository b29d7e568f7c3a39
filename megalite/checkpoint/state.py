"""The interface that checkpoints need from a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.optim.shard import Segment


class Updates(Protocol):
    """What checkpoints need of an optimizer."""

    @property
    def step_count(self) -> int:
        """The number of updates made."""
        ...

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of all state tensors, sorted."""
        ...

    def set_step_count(self, steps: int) -> None:
        """Declare that the state is the one after `steps` updates."""
        ...


class Checkpointable(Protocol):
    """One or more models of which this rank holds some boxes, such as the trainer.

    Saved are the master weights of `saved_segments`, trained or frozen, and, under its own name, every tensor of their
    `state`. These are all parameters, without the base of an adapter that lies elsewhere.
    """

    @property
    def mesh(self) -> Mesh: ...

    @property
    def models(self) -> Sequence[ShardedModel]:
        """The models, one by one."""
        ...

    @property
    def saved_segments(self) -> Sequence[Segment]: ...

    @property
    def optimizer(self) -> Updates: ...

    @property
    def prefix(self) -> str:
        """What all its names begin with; checkpoints of a single model have no prefix."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and global shapes of all tensors that a checkpoint of it holds."""
        ...

    def fresh_shapes(self) -> dict[str, tuple[int, ...]]:
        """The subset that another run's checkpoint may lack; those keep their initial values."""
        ...

    def wait_for_all_gather(self) -> None:
        """Wait for parameters that are still being gathered."""
        ...

    def share(self) -> None:
        """Round new master weights of the segments into the parameters and all-gather them."""
        ...
