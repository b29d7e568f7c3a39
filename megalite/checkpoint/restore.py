"""Loading a checkpoint into a trainer, whatever layout wrote it.

Each rank reads the boxes in its optimizer shard, rounds them into the parameters and all-gathers those as after a
training step; so the loaded state is bitwise the saved one in every layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.directory import CHECKPOINTS, complete_checkpoints
from megalite.checkpoint.manifest import MANIFEST, WEIGHT, Manifest
from megalite.checkpoint.peers import Peers
from megalite.checkpoint.source import (
    CheckpointReader,
    Prefixed,
    Target,
    TensorSource,
    compare_shapes,
    needed,
)
from megalite.checkpoint.state import Checkpointable
from megalite.config import ModelConfig
from megalite.config.model import TRAINING_ONLY
from megalite.errors import UserError
from megalite.placement import Region

ADAPTABLE = (
    *("max_positions", "rope_theta", "rope_scaling", "rope_local_theta", "sliding_window", "layer_types", "norm_eps"),
    *TRAINING_ONLY,
)
"""Model fields that may differ from the checkpoint a new run starts from: no weight depends on them."""


def model_fields(model: ModelConfig) -> dict[str, Any]:
    """The model's configuration as JSON values, as in a manifest."""
    return json.loads(json.dumps(dataclasses.asdict(model)))


def compare_model(stored: Mapping[str, Any], where: Path, model: ModelConfig, adaptable: Sequence[str] = ()) -> None:
    """Raise a `UserError` that names the model fields in which a checkpoint differs from the configuration."""
    own = model_fields(model)
    differing = [
        f"model.{name} is {stored[name]!r} in the checkpoint and {own.get(name)!r} in the configuration"
        for name in sorted(stored)
        if name not in adaptable and stored[name] != own.get(name)
    ]
    if differing:
        raise UserError(
            f"{where} is of another model: {'; '.join(differing)}; use its configuration, or another checkpoint"
        )


def compare_fingerprint(reader: CheckpointReader, fingerprint: Any) -> None:
    """Raise a `UserError` that says how the training data differs from those of the checkpoint."""
    stored, own = reader.manifest.state.get("fingerprint"), json.loads(json.dumps(fingerprint))
    if isinstance(stored, str) and isinstance(own, dict):
        own = own.get("order")  # a checkpoint from before the fields were kept
    if stored is None or stored == own:
        return
    if isinstance(stored, dict) and isinstance(own, dict):
        names = sorted(name for name in stored.keys() | own.keys() if stored.get(name) != own.get(name))
        names = [name for name in names if name != "order"] or names  # it follows from the others
        what = ", ".join(f"{name} was {stored.get(name)!r} and is {own.get(name)!r}" for name in names)
    else:
        what = f"its fingerprint was {stored!r} and is {own!r}"
    raise UserError(
        f"the training data is not that of {reader.directory}: {what}; restore the data, or go on with "
        "checkpoint.allow_data_change = true"
    )


def compare_objective(reader: CheckpointReader, kind: str, *, resume: bool) -> None:
    """Raise a `UserError` if the checkpoint's loop and optimizer state is of another objective."""
    trained_for = reader.manifest.state.get("objective", kind)
    if trained_for != kind:
        remedy = "use another run.dir" if resume else "take only its weights, with checkpoint.load_optimizer = false"
        raise UserError(
            f"{reader.directory} was trained with objective.kind = {trained_for!r}, and it is now {kind!r}; {remedy}"
        )


def planned_samples(run_dir: Path | str, peers: Peers) -> int | None:
    """The number of samples a run was first planned for, from its newest readable checkpoint; None if unknown.

    Collective; called before the data is opened, so that a run that is extended keeps its original data order.
    """
    planned = None
    if peers.rank == 0:
        for _, path in reversed(complete_checkpoints(Path(run_dir) / CHECKPOINTS)):
            with contextlib.suppress(UserError):  # damaged: the one before it is used
                planned = Manifest.from_file(path / MANIFEST).state.get("planned_samples")
                break
    planned = peers.first(planned)
    return planned if isinstance(planned, int) and planned > 0 else None


def _targets(trainer: Checkpointable, kind: str) -> Iterator[Target]:
    for segment in trainer.saved_segments:
        values = segment.master.detach() if kind == WEIGHT else segment.state.get(kind)
        if values is None:
            continue
        pieces = list(segment.pieces())
        end = 0
        for start, stop in sorted((where.start, where.stop) for _, where in pieces):
            values[end:start].zero_()  # padding, and it alone: not every tensor need come from the source
            end = stop
        values[end:].zero_()
        for box, where in pieces:
            yield Target(box.name, Region(box.offset, box.size), values[where].view(box.size))


def read_state(trainer: Checkpointable, source: TensorSource, *, optimizer: bool, resume: bool = True) -> None:
    """Read weights, and optimizer state if `optimizer`, into this rank's shard, without communication.

    Without `resume` the source may be another run's: it may lack tensors that are new here (adapters, another head) and
    hold an output layer, a score or a critic that is not needed. `finish_load` must follow on all ranks. Raises
    `DamagedFile` or another `UserError`; the trainer's state is then partly overwritten.
    """
    whole, found = trainer.shapes(), source.shapes()
    expected = whole
    if not resume:
        if trainer.prefix and not any(name.startswith(trainer.prefix) for name in found):
            source = Prefixed(source, trainer.prefix)
            found = source.shapes()
        fresh = trainer.fresh_shapes().keys() - found.keys()
        expected = {name: shape for name, shape in whole.items() if name not in fresh}
        found = needed(found, whole)
        if any(model.base is not None for model in trainer.models):  # its weights are read by `load_base`
            found = {name: shape for name, shape in found.items() if name in whole}
    compare_shapes(expected, found, str(getattr(source, "directory", "the source")))
    trainer.wait_for_all_gather()
    weights = [target for target in _targets(trainer, WEIGHT) if target.name in expected]
    for segment in trainer.saved_segments:
        for values in segment.state.values():
            values.zero_()
    if not isinstance(source, CheckpointReader):
        for target in weights:
            target.destination.copy_(source.read(target.name, target.region.offset, target.region.size))
        return
    targets = {WEIGHT: weights}  # read in one pass: a file holds the state of a tensor beside its weight
    for kind in trainer.optimizer.state_names if optimizer else ():
        if _has_state(source, kind):
            targets[kind] = list(_targets(trainer, kind))
            _require_state(source, kind, targets[kind])
    source.read_into(targets)


def _require_state(source: CheckpointReader, kind: str, targets: Sequence[Target]) -> None:
    """Raise a `UserError` where the checkpoint trained fewer tensors than are trained now."""
    stored = source.manifest.index[kind]
    if missing := next((target.name for target in targets if target.name not in stored), None):
        raise UserError(
            f"{source.directory} holds no optimizer state of {missing}, which is trained now; start from its weights "
            "with checkpoint.load_optimizer = false"
        )


def _has_state(source: TensorSource, kind: str) -> bool:
    """Whether the source stores this optimizer state; before the first update it is zero and may be absent."""
    if not isinstance(source, CheckpointReader):
        return False
    kinds = source.manifest.index.keys()
    if kind in kinds:
        return True
    if source.manifest.updates > 0:
        stored = ", ".join(sorted(kinds - {WEIGHT})) or "none"
        raise UserError(
            f"{source.directory} holds no optimizer state {kind} (it has {stored}): another optimizer wrote it; use "
            "that one, or start from its weights with checkpoint.load_optimizer = false"
        )
    return False


def finish_load(trainer: Checkpointable, updates: int) -> None:
    """All-gather the weights that were read, and set the optimizer's update count."""
    trainer.share()
    trainer.optimizer.set_step_count(updates)


def position(state: Mapping[str, Any]) -> int:
    """The step in a training loop's state."""
    step = state["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"state['step'] = {step!r} is not a count of steps")
    return step
