"""Weights from wherever they lie: a run, a checkpoint, a Hugging Face directory, or an adapter on one of these.

An adapter's checkpoint holds the adapter alone, and says which weights it was trained on (`Identity`); a PEFT directory
names them in `adapter_config.json`. `open_weights` opens both parts. `Source.whole` is then the model with the adapter
merged into it, and `Source.beside` both side by side, for a model that has the same adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.huggingface.export import recipe_of
from megalite.checkpoint.huggingface.names import HuggingFaceSource, is_huggingface
from megalite.checkpoint.huggingface.peft import PeftSource, is_peft
from megalite.checkpoint.manifest import MANIFEST
from megalite.checkpoint.restore import model_fields, read_state
from megalite.checkpoint.source import (
    CheckpointReader,
    Prefixed,
    Shapes,
    TensorSource,
    compare_shapes,
    fill_base,
)
from megalite.checkpoint.state import Checkpointable
from megalite.config import AdapterConfig, Config, ModelConfig, build_config
from megalite.errors import UserError
from megalite.model.decoder import CRITIC, SCORE
from megalite.model.lora import LoRA, pair_names
from megalite.registry import look_up

Identity = Mapping[str, str]
"""Where weights came from (`source`), and a hash of what describes their files (`sha256`)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights, open to be read: `tensors` are those of a model, and if there is an `adapter` on it, of its base."""

    tensors: TensorSource
    model: Mapping[str, Any]
    identity: dict[str, str]
    adapter: TensorSource | None = None
    adapter_config: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)

    @property
    def architecture(self) -> ModelConfig:
        return build_config({"model": dict(self.model)}).model

    def whole(self) -> TensorSource:
        """The tensors of the model, an adapter merged into them. Raises UserError for one that cannot be."""
        if self.adapter is None:
            return self.tensors
        return Merged(self.tensors, self.adapter, self.adapter_config)

    def beside(self) -> TensorSource:
        """The tensors of the model, and those of an adapter under their own names."""
        return self.tensors if self.adapter is None else Beside(self.tensors, self.adapter)


class Beside:
    """Two sources as one; what both have is read from the second."""

    def __init__(self, base: TensorSource, adapter: TensorSource) -> None:
        self._base, self._adapter = base, adapter
        self.directory = getattr(adapter, "directory", "the adapter")
        self._shapes = {**base.shapes(), **adapter.shapes()}

    def shapes(self) -> Shapes:
        return self._shapes

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        source = self._adapter if name in self._adapter.shapes() else self._base
        return source.read(name, offset, size)


class Merged:
    """A model with LoRA merged into its weights: W + scale * B A, added in fp32; other tensors as they are."""

    def __init__(self, base: TensorSource, adapter: TensorSource, config: AdapterConfig) -> None:
        self._base, self._adapter = base, adapter
        self.directory = getattr(adapter, "directory", "the adapter")
        kind = look_up("adapter.kind", config.kind)
        if not (isinstance(kind, type) and issubclass(kind, LoRA)):
            raise UserError(f"{self.directory}: adapter.kind = {config.kind!r} cannot be merged; lora and rslora can")
        self._scale = kind(config).scale
        found = {name: shape for name, shape in adapter.shapes().items() if not name.startswith(CRITIC)}
        base_shapes = base.shapes()
        self._pairs: dict[str, tuple[str, str]] = {}
        for name, shape in base_shapes.items():
            down, up = pair_names(name)
            if len(shape) != 2 or (down not in found and up not in found):
                continue
            expected = {down: (config.rank, shape[1]), up: (shape[0], config.rank)}
            there = {pair: found.pop(pair) for pair in (down, up) if pair in found}
            compare_shapes(expected, there, str(self.directory), f"its base {getattr(base, 'directory', '')}".strip())
            self._pairs[name] = (down, up)
        stray = sorted(name for name in found if is_adapters(name))
        if stray:
            raise UserError(f"{self.directory}: {stray[0]} belongs to no weight of its base")
        self._shapes = {**base_shapes, **found}

    @property
    def changed(self) -> frozenset[str]:
        """The names of the tensors that are not the base's."""
        return frozenset(self._pairs) | (self._shapes.keys() & self._adapter.shapes().keys())

    def shapes(self) -> Shapes:
        return self._shapes

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        if name in self._adapter.shapes():
            return self._adapter.read(name, offset, size)
        box = self._base.read(name, offset, size)
        if name not in self._pairs:
            return box
        down, up = self._pairs[name]
        rank = self._adapter.shapes()[down][0]
        down_rI = self._adapter.read(down, (0, offset[1]), (rank, size[1])).float()
        up_Or = self._adapter.read(up, (offset[0], 0), (size[0], rank)).float()
        return torch.addmm(box.float(), up_Or, down_rI, alpha=self._scale)


def is_adapters(name: str) -> bool:
    """Whether a tensor is one of LoRA's."""
    return name in pair_names(name.rsplit(".lora_", 1)[0])


@contextlib.contextmanager
def open_weights(path: Path | str, prefix: str = "") -> Iterator[Source]:
    """Open a run directory (its newest checkpoint), a checkpoint, a Hugging Face directory or a PEFT directory.

    `prefix` is that of one model in a checkpoint of several, for the base of its adapter. Raises UserError.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if is_peft(path):
            adapter = stack.enter_context(PeftSource(path))
            base = stack.enter_context(open_weights(adapter.base))
            if base.adapter is not None:
                raise UserError(f"{path}: its base {adapter.base} is an adapter itself; merge that first")
            adapter.require_weights(base.tensors.shapes())
            yield dataclasses.replace(base, adapter=adapter, adapter_config=adapter.config)
        elif is_huggingface(path):
            source = stack.enter_context(HuggingFaceSource(path))
            # Weights are too large to be hashed at every start; sizes tell most changes.
            names = sorted((file.name, file.stat().st_size) for file in path.iterdir() if file.is_file())
            described = (path / "config.json").read_bytes() + repr(names).encode()
            yield Source(source, model_fields(source.model), _identity(path, described))
        else:
            reader = stack.enter_context(CheckpointReader(path))
            yield stack.enter_context(open_checkpoint(reader, prefix))


@contextlib.contextmanager
def open_checkpoint(reader: CheckpointReader, prefix: str = "") -> Iterator[Source]:
    """A checkpoint that is open already, with the base of its adapter if it has one. Raises UserError."""
    described = (reader.directory / MANIFEST).read_bytes()  # it holds the checksum of every tensor
    own = Source(reader, reader.manifest.model, _identity(reader.directory, described))
    bases = reader.manifest.bases
    known = bases.get(prefix) or bases.get("")
    if known is None:
        yield own
        return
    with open_base(known, "", str(reader.directory)) as base:
        yield dataclasses.replace(base, model=own.model, adapter=reader, adapter_config=adapter_config_of(reader))


def adapter_config_of(reader: CheckpointReader) -> AdapterConfig:
    """The section `adapter` of a checkpoint's recipe."""
    return build_config({"adapter": recipe_of(reader).get("adapter", {})}).adapter


@contextlib.contextmanager
def open_base(known: Identity, otherwise: str, needs: str) -> Iterator[Source]:
    """The weights with a known identity, from where they were, else from `otherwise`; `needs` says who asks, for the
    message of the UserError where they are not there or are others."""
    place = known["source"] if Path(known["source"]).exists() or not otherwise else otherwise
    if not Path(place).exists():
        raise UserError(f"{needs} needs the weights of {place}, which is not there; restore it")
    with open_weights(place) as source:
        if source.identity["sha256"] != known["sha256"]:
            raise UserError(f"{needs}: {place} is not the model with which this run began; restore that one")
        yield source


def require_same_adapter(stored: AdapterConfig, own: AdapterConfig, where: str) -> None:
    """Raise a `UserError` where an adapter in a file computes another thing than the configuration's."""
    for name in ("kind", "rank", "alpha"):
        was, is_now = getattr(stored, name), getattr(own, name)
        if was != is_now:
            raise UserError(f"{where} has adapter.{name} = {was!r}, and it is now {is_now!r}; use the former")


def begin_from(trainer: Checkpointable, source: Source, where: Path, *, optimizer: bool) -> None:
    """Read another run's weights into this rank's part of a model, and optimizer state if `optimizer`.

    Without an adapter of its own, the model gets those of the source merged. `finish_load` must follow on all ranks.
    Raises UserError.
    """
    (model,) = trainer.models
    if model.adapter is None:
        if source.adapter is not None and optimizer:
            raise UserError(
                f"{where} holds an adapter, whose optimizer state is not that of the merged weights; set "
                "checkpoint.load_optimizer = false"
            )
        read_state(trainer, source.whole(), optimizer=optimizer, resume=False)
        return
    beside = source.tensors
    if source.adapter is not None:
        require_same_adapter(source.adapter_config, model.config.adapter, str(where))
        beside = source.adapter
        if model.prefix and not any(name.startswith(model.prefix) for name in beside.shapes()):
            beside = Prefixed(beside, model.prefix)
        expected = {name: shape for name, shape in model.all_shapes().items() if name not in model.base_shapes()}
        expected, found = (
            {n: s for n, s in each.items() if not n.endswith(SCORE)} for each in (expected, beside.shapes())
        )
        found = {name: shape for name, shape in found.items() if name.startswith(CRITIC) == (model.prefix == CRITIC)}
        compare_shapes(expected, found, str(where), "the adapter of the configuration")
    fill_base(model, source.tensors)
    model.base = source.identity
    read_state(trainer, beside, optimizer=optimizer, resume=False)


def restore_bases(trainer: Checkpointable, reader: CheckpointReader, config: Config) -> None:
    """Before a run goes on from its own checkpoint: read the weights that its adapters belong to, unless they are there
    already. Raises UserError if they are not those with which the run began."""
    stored = adapter_config_of(reader)
    if "none" not in (stored.kind, config.adapter.kind):
        require_same_adapter(stored, config.adapter, str(reader.directory))
    for model in trainer.models:
        known = reader.manifest.bases.get(model.prefix)
        if known is None or model.base == known:
            continue
        if model.adapter is None:
            raise UserError(
                f"{reader.directory} holds an adapter alone, and adapter.kind is now 'none'; set it as before"
            )
        otherwise = (config.policy.critic if model.prefix else "") or config.checkpoint.load
        with open_base(known, otherwise, str(reader.directory)) as source:
            fill_base(model, source.tensors)
        model.base = known


def _identity(directory: Path, described: bytes) -> dict[str, str]:
    return {"source": str(directory.absolute()), "sha256": hashlib.sha256(described).hexdigest()}
