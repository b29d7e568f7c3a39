"""Frozen models beside the trained one: the reference of DPO, PPO and GRPO, and reward models.

They have the layout of the trained model, no gradients and no optimizer state. A checkpoint does not hold them: it
records where they came from and what was there, and a run does not go on with another model under the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.peers import Peers
from megalite.checkpoint.restore import ADAPTABLE, compare_model
from megalite.checkpoint.source import fill_model
from megalite.checkpoint.weights import Identity, open_weights
from megalite.config import AdapterConfig, Config, ModelConfig
from megalite.config.check import check_combinations
from megalite.errors import UserError
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel


def load_frozen(
    config: Config,
    mesh: Mesh,
    kernels: Kernels,
    peers: Peers,
    path: str,
    *,
    field: str,
    head: str = "vocabulary",
    known: Identity | None = None,
) -> tuple[ShardedModel, dict[str, str]]:
    """A frozen model from `path`, which the configuration's `field` names, and its identity.

    With a scalar head it may be of another shape than the trained model, over the same vocabulary; otherwise it must be
    the same. `known` is the identity with which the run began. Raises UserError on every rank.
    """
    fault, loaded = "", None
    config = dataclasses.replace(config, adapter=AdapterConfig())  # one in the files is merged
    try:
        # A run directory's newest checkpoint may change; a run goes on with the one that it began with.
        place = known["source"] if known and Path(known["source"]).exists() else path
        with open_weights(place) as source:
            if known is not None and source.identity["sha256"] != known["sha256"]:
                raise UserError(
                    f"{field} = {path!r}: {place} is not the model with which this run began; restore that one"
                )
            if head == "vocabulary":
                compare_model(source.model, Path(place), config.model, ADAPTABLE)
            else:
                config = _with_model(config, mesh, source.architecture, field, place)
            model = ShardedModel(config, mesh, kernels, head=head, trained=False)
            fill_model(model, source.whole())
            loaded = model, dict(source.identity)
    except UserError as error:
        fault = str(error)
    if fault := next(filter(None, peers.exchange(fault)), ""):
        raise UserError(fault)
    assert loaded is not None
    return loaded


def _with_model(config: Config, mesh: Mesh, other: ModelConfig, field: str, place: str) -> Config:
    """The configuration with another model, in the same layout."""
    if other.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{field}: {place} has a vocabulary of {other.vocab_size} tokens, the policy one of "
            f"{config.model.vocab_size}; a reward model must read the policy's tokens"
        )
    changed = dataclasses.replace(config, model=other)
    check_combinations(changed, mesh.size)
    return changed


class Reference:
    """The frozen model that a policy is compared with: `objective.reference`, else `checkpoint.load`, else the initial
    weights of `run.seed`. A `policy` with an adapter has it in itself: without `objective.reference`, the reference is
    the policy without its adapter, and no copy."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels, peers: Peers, policy: ShardedModel) -> None:
        self._config, self._mesh, self._kernels, self._peers = config, mesh, kernels, peers
        self._policy = policy
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
        if self._policy.adapter is not None and not config.objective.reference:
            self._model = self._policy.without_adapter()
            return
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
