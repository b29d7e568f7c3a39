"""DPO: a step from pairs of answers, with the frozen reference's log-probabilities beside the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megalite.align.frozen import Reference
from megalite.checkpoint.peers import Peers
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.objective.preference import REFERENCE
from megalite.train.task import GradientTask


class PreferenceTask(GradientTask):
    """Adds the column `reference` to every batch, and otherwise trains like any objective on batches."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels) -> None:
        super().__init__(config, mesh, kernels)
        self._reference = Reference(config, mesh, kernels, Peers(mesh), self.trainer)

    def prepare(self, state: Mapping[str, Any]) -> None:
        self._reference.prepare(state)

    def state(self) -> dict[str, Any]:
        return self._reference.state()

    def complete(self, batches: Sequence[Batch | None]) -> Sequence[Batch | None]:
        """The micro-batches with the reference's log-probabilities, on the ranks of the last stage."""
        with self.phase("score"):
            scores = self._reference.model.score(batches)
        if not scores:
            return batches
        return [
            dataclasses.replace(batch, columns={**batch.columns, REFERENCE: score_2BS[0]})
            for batch, score_2BS in zip(batches, scores, strict=True)
            if batch is not None
        ]
