"""Several trainers in one checkpoint, such as a policy and its critic, whose tensors have names of their own."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.mesh import Mesh
from megalite.optim.shard import Segment
from megalite.train.trainer import Trainer


class Together:
    """The state of all `trainers`; see `megalite.checkpoint.state.Checkpointable`. The first counts the updates."""

    prefix = ""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = tuple(trainers)
        self.optimizer = _Optimizers(self.trainers)

    @property
    def mesh(self) -> Mesh:
        return self.trainers[0].mesh

    @property
    def models(self) -> Sequence[Trainer]:
        return self.trainers

    @property
    def saved_segments(self) -> Sequence[Segment]:
        return [segment for trainer in self.trainers for segment in trainer.saved_segments]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for trainer in self.trainers for name, shape in trainer.shapes().items()}

    def fresh_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for trainer in self.trainers for name, shape in trainer.fresh_shapes().items()}

    def wait_for_all_gather(self) -> None:
        for trainer in self.trainers:
            trainer.wait_for_all_gather()

    def share(self) -> None:
        for trainer in self.trainers:
            trainer.share()


class _Optimizers:
    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self._all = [trainer.optimizer for trainer in trainers]

    @property
    def step_count(self) -> int:
        return self._all[0].step_count

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(sorted({name for optimizer in self._all for name in optimizer.state_names}))

    def set_step_count(self, steps: int) -> None:
        for optimizer in self._all:
            optimizer.set_step_count(steps)
