"""DPO: a step from pairs of answers, with the frozen reference's log-probabilities beside the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megalite.align.frozen import load_frozen
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.peers import Peers
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.objective.preference import REFERENCE
from megalite.train.task import GradientTask


class Reference:
    """The frozen model that a policy is compared with: `objective.reference`, else `checkpoint.load`, else the initial
    weights of `run.seed`."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels, peers: Peers) -> None:
        self._config, self._mesh, self._kernels, self._peers = config, mesh, kernels, peers
        self._model: ShardedModel | None = None
        self._identity: dict[str, str] = {}

    @property
    def model(self) -> ShardedModel:
        assert self._model is not None, "the reference is loaded by `prepare`"
        return self._model

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Load it, once; `state` is the task's of the checkpoint, if any."""
        if self._model is not None:
            return
        config = self._config
        path = config.objective.reference or config.checkpoint.load
        known = state.get("reference") or None
        if path or known:
            field = "objective.reference" if config.objective.reference else "checkpoint.load"
            place = path or known["source"]  # type: ignore[index]
            self._model, self._identity = load_frozen(
                config, self._mesh, self._kernels, self._peers, place, field=field, known=known
            )
            return
        self._model = ShardedModel(config, self._mesh, self._kernels, trained=False)
        self._model.initialise()

    def state(self) -> dict[str, Any]:
        return {"reference": self._identity}


class PreferenceTask(GradientTask):
    """Adds the column `reference` to every batch, and otherwise trains like any objective on batches."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels) -> None:
        super().__init__(config, mesh, kernels)
        self._reference = Reference(config, mesh, kernels, Peers(mesh))

    def prepare(self, checkpoints: CheckpointManager, state: Mapping[str, Any]) -> None:
        self._reference.prepare(state)

    def state(self) -> dict[str, Any]:
        return self._reference.state()

    def complete(self, batches: Sequence[Batch | None]) -> Sequence[Batch | None]:
        """The micro-batches with the reference's log-probabilities, on the ranks of the last stage."""
        with self.phase("reference"):
            scores = self._reference.model.score(batches)
        if not scores:
            return batches
        return [
            dataclasses.replace(batch, columns={**batch.columns, REFERENCE: score_2BS[0]})
            for batch, score_2BS in zip(batches, scores, strict=True)
            if batch is not None
        ]
