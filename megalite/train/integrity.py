"""Flipped bits: found by comparing what must be equal, told from bugs by making the same steps again.

A difference is never explained where it is found: the steps since the last comparison are made again from a checkpoint,
with the same data. A bit that flipped by itself does not flip again: now all copies are equal, and the rank whose copy
was furthest from them is the one where it did. A difference that comes back is a bug, or a device that always computes
wrongly, and ends the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.errors import RunFailed
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.train.replicas import Difference, Key, Replicas, hosts
from megalite.train.trainer import Damaged, Trainer

_NAMED = 3
"""Differences that a message lists."""

_KEPT = 8
"""Differences whose values are kept until the steps have been made again."""

log = logging.getLogger("megalite")


@dataclass(frozen=True)
class _Found:
    """What was found after `step`: all ranks' differences, and the values of the first of them on this rank."""

    step: int
    differences: Sequence[Difference]
    values: dict[Key, Tensor]


class Integrity:
    """The checks of a run, every `interval` steps (0: none). `event` records what was found; all ranks call alike."""

    def __init__(self, models: Sequence[ShardedModel], mesh: Mesh, interval: int, event: Callable[..., object]) -> None:
        self._trainers = [model for model in models if isinstance(model, Trainer)]
        self._mesh, self._interval, self._event = mesh, interval, event
        self._replicas = Replicas(models, mesh)
        self._found: _Found | None = None
        self.sound = 0
        """The last step after which all was equal, and so the newest whose checkpoint can be trusted."""

    def due(self, step: int, saving: bool) -> bool:
        """Whether to check after this step; before a checkpoint, always."""
        if not self._interval:
            return False
        return saving or step % self._interval == 0 or (self._found is not None and step == self._found.step)

    def check(self, step: int) -> str:
        """Compare all that must be equal after `step`; what differs, as text, or "". Raises `RunFailed` if this was
        found before, after the same step."""
        self._check_shards()
        differences = self._replicas.compare(self._replicas.digests())
        if self._found is not None and self._found.step == step:
            self._judge(self._found, differences)
        if not differences:
            self.sound = step
            return ""
        self._found = _Found(step, differences, self._replicas.values(_keys(differences[:_KEPT])))
        why = f"the copies of {_listed(differences)} are not the same"
        self._event("damaged", step=step, why=why)
        log.error("step %d: %s", step, why)
        suspects = {difference.suspects for difference in differences}
        if len(suspects) == 1 and (ranks := suspects.pop()):
            self._blame(step, ranks)
        return why

    def report(self, step: int, damage: Damaged) -> str:
        """Record that an optimizer shard changed before the update of `step`; the reason to make steps again."""
        self._event("damaged", step=step, why=str(damage))
        self._blame(step, damage.ranks)
        return str(damage)

    def _check_shards(self) -> None:
        count = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        for trainer in self._trainers:
            count += trainer.optimizer.damage()
        self._mesh.world.all_reduce(count, "max").wait()
        if count.item():
            names = [name for trainer in self._trainers for name in trainer.optimizer.damaged()]
            raise Damaged(self._mesh.world.gather_json(names, self._mesh.device))

    def _judge(self, before: _Found, differences: Sequence[Difference]) -> None:
        """The steps up to a difference have been made again: say what it was."""
        self._found = None
        known = _keys(before.differences)
        if again := [difference for difference in differences if difference.key in known]:
            raise RunFailed(
                f"step {before.step}: the copies of {_listed(again)} differ again after the same steps were made "
                "again: no flipped bit but a bug, or a device that always computes wrongly"
            )
        now = self._replicas.values(before.values)
        own = [
            [*key, float((now[key] - value).abs().nan_to_num(math.inf).max())] for key, value in before.values.items()
        ]
        moved: dict[Key, dict[int, float]] = {}
        for rank, lines in enumerate(self._mesh.world.gather_json(own, self._mesh.device)):
            for name, offset, distance in lines:
                moved.setdefault((name, tuple(offset)), {})[rank] = distance
        ranks = {rank for difference in before.differences[:_KEPT] for rank in _furthest(difference, moved)}
        self._blame(before.step, sorted(ranks))

    def _blame(self, step: int, ranks: Sequence[int]) -> None:
        names = hosts(self._mesh)
        for rank in ranks:
            log.error("a bit flipped on rank %d, host %s, by step %d: suspect its memory", rank, names[rank], step)
            self._event("flipped_bit", step=step, rank=rank, host=names[rank])


def _keys(differences: Sequence[Difference]) -> set[Key]:
    return {difference.key for difference in differences}


def _furthest(difference: Difference, moved: Mapping[Key, Mapping[int, float]]) -> list[int]:
    """The ranks whose copy was further from the second computation than that of others; none if all were alike."""
    distances = [max(moved[difference.key][rank] for rank in ranks) for ranks in difference.sides]
    least = min(distances)
    return [rank for ranks, distance in zip(difference.sides, distances) if distance > least for rank in ranks]


def _listed(differences: Sequence[Difference]) -> str:
    shown = "; ".join(map(str, differences[:_NAMED]))
    return shown + (f"; and {len(differences) - _NAMED} more" if len(differences) > _NAMED else "")
