"""Frozen models beside the trained one: the reference of DPO, PPO and GRPO, and reward models.

They have the layout of the trained model, no gradients and no optimizer state. A checkpoint does not hold them: it
records where they came from and what was there, and a run does not go on with another model under the same name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.huggingface.names import HuggingFaceSource, is_huggingface
from megalite.checkpoint.manifest import MANIFEST
from megalite.checkpoint.peers import Peers
from megalite.checkpoint.restore import ADAPTABLE, compare_model, model_fields
from megalite.checkpoint.source import CheckpointReader, TensorSource, fill_model
from megalite.config import Config, ModelConfig, build_config
from megalite.config.check import check_combinations
from megalite.errors import UserError
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel

Identity = Mapping[str, str]
"""Where a frozen model came from (`source`), and a hash of what describes its files (`sha256`)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The weights of another run, checkpoint or Hugging Face directory, open to be read."""

    tensors: TensorSource
    model: Mapping[str, Any]
    identity: dict[str, str]

    @property
    def architecture(self) -> ModelConfig:
        return build_config({"model": dict(self.model)}).model


@contextlib.contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Open a run directory (its newest checkpoint), a checkpoint or a Hugging Face directory. Raises UserError."""
    if is_huggingface(Path(path)):
        with HuggingFaceSource(path) as source:
            # Weights are too large to be hashed at every start; sizes tell most changes.
            names = sorted((file.name, file.stat().st_size) for file in source.directory.iterdir() if file.is_file())
            described = (source.directory / "config.json").read_bytes() + repr(names).encode()
            yield Source(source, model_fields(source.model), _identity(source.directory, described))
        return
    with CheckpointReader(path) as reader:
        described = (reader.directory / MANIFEST).read_bytes()  # it holds the checksum of every tensor
        yield Source(reader, reader.manifest.model, _identity(reader.directory, described))


def _identity(directory: Path, described: bytes) -> dict[str, str]:
    return {"source": str(directory), "sha256": hashlib.sha256(described).hexdigest()}


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
    try:
        # A run directory's newest checkpoint may change; a run goes on with the one that it began with.
        place = known["source"] if known and Path(known["source"]).exists() else path
        with open_source(place) as source:
            if known is not None and source.identity["sha256"] != known["sha256"]:
                raise UserError(
                    f"{field} = {path!r}: {place} is not the model with which this run began; restore that one"
                )
            if head == "vocabulary":
                compare_model(source.model, Path(place), config.model, ADAPTABLE)
            else:
                config = _with_model(config, mesh, source.architecture, field, place)
            model = ShardedModel(config, mesh, kernels, head=head, trained=False)
            fill_model(model, source.tensors)
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
