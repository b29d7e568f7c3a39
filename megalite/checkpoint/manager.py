"""Checkpoints of a run: saved by all ranks together, synchronously or in the background, loaded and pruned.

The protocol of a save, in which all ranks synchronise at every arrow:

    rank 0 creates step_N.partial  ->  every rank writes and syncs its file  ->  rank 0 checks that the pieces tile
    every tensor, writes the manifest, syncs, renames to step_N, prunes  ->  all ranks know the outcome

So a checkpoint under its final name is complete, and a failure anywhere leaves older ones untouched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint import directory
from megalite.checkpoint.checksum import CRC32, agreed, newest
from megalite.checkpoint.huggingface.names import is_huggingface
from megalite.checkpoint.huggingface.peft import is_peft
from megalite.checkpoint.identity import RunIdentity
from megalite.checkpoint.lock import RunLock
from megalite.checkpoint.manifest import Index, Manifest, Piece, add_piece
from megalite.checkpoint.peers import Peers
from megalite.checkpoint.restore import (
    ADAPTABLE,
    compare_fingerprint,
    compare_model,
    compare_objective,
    finish_load,
    model_fields,
    position,
    read_state,
)
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.staging import Staging
from megalite.checkpoint.state import Checkpointable
from megalite.checkpoint.tensor_file import DamagedFile, write_durably, write_tensor_file
from megalite.checkpoint.weights import begin_from, open_checkpoint, open_weights, restore_bases
from megalite.config import Config, to_toml
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.placement import Box
from megalite.text.tokenizers import TEMPLATE_FILE, load_tokenizer

log = logging.getLogger(__name__)

_LOOK_SECONDS = 10.0


@dataclass(frozen=True)
class _Snapshot:
    """Everything a save needs, independent of the trainer's next steps."""

    final: Path
    tensors: list[dict[str, Tensor]]
    manifest: Manifest


def bases_of(trainer: Checkpointable) -> dict[str, dict[str, str]]:
    """Which weights the trainer's adapters belong to, by the prefix of the model."""
    return {model.prefix: dict(model.base) for model in trainer.models if model.base is not None}


def _attempt(action: Callable[[], Any]) -> str | None:
    """Run `action`; returns its error (file system or data) as one line, or None."""
    try:
        action()
    except (OSError, UserError, ValueError) as error:
        return str(error)
    return None


def _require_finite(pieces: Iterable[tuple[str, Box, str, Tensor]]) -> None:
    for kind, box, _, values in pieces:
        low, high = torch.aminmax(values)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(f"{kind} of {box.name} is not finite")


class CheckpointManager:
    """The checkpoints under `run_dir`; created, used and closed by all ranks together.

    Holds the lock of the run directory until `close`: `lock` if rank 0 already holds it, else a new one, in which case
    construction raises `UserError` if another run holds the directory. Nothing but the lock is written before `accept`.
    `failures` counts failed saves, `last_failure` is the reason of the last: each is logged and cleaned up, and the run
    continues.
    """

    def __init__(
        self, run_dir: Path | str, config: Config, mesh: Mesh, lock: RunLock | None = None, peers: Peers | None = None
    ) -> None:
        self.config, self.failures, self.last_failure = config, 0, ""
        self.folder = Path(run_dir) / directory.CHECKPOINTS
        self._peers = peers or Peers(mesh)
        self._lock = lock
        self._identity: RunIdentity | None = None
        self._staging: Staging | None = None
        self._writer: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._succeeded = True
        refusal = _attempt(self._begin) if mesh.rank == 0 else None
        if refusal := self._peers.first(refusal):
            raise UserError(refusal)
        self._owner = self._peers.first(self._lock.token if self._lock else None)
        self._looked = time.monotonic()
        self._checksum = agreed(self._peers.exchange(newest().name))
        if mesh.rank == 0 and self._checksum is CRC32:
            log.warning("the package xxhash is missing: new checkpoints get CRC-32 checksums, which are slower")

    def _begin(self) -> None:
        self._lock = self._lock or RunLock(self.folder.parent)
        directory.restore(self.folder)
        self._identity = RunIdentity(self.folder, self.config.checkpoint.allow_other_run)

    def accept(self) -> None:
        """Start writing to the directory: remove the remains of interrupted saves, and write the run's id."""
        if self._identity is not None and not self._identity.kept:
            for path in directory.sweep(self.folder):
                log.warning("removed %s, left by an interrupted run", path)
            self._identity.keep()

    def _verify(self) -> None:
        if self._lock is not None:
            self._lock.verify()

    def guard(self) -> None:
        """Call once a step: checks at most every ten seconds, on rank 0, and raises `TakenOver` if a later start holds
        the directory."""
        if self._lock is not None and time.monotonic() > self._looked + _LOOK_SECONDS:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError, UserError):  # the file system may be unavailable for a moment
                self._verify()

    # Saving

    def save(self, trainer: Checkpointable, state: Mapping[str, Any]) -> float:
        """Save the trainer and the loop's `state` (JSON values; `step` among them) as `step_<step>`.

        Returns the seconds that training was stalled: until the state is copied to host memory if
        `checkpoint.async_save`, else until the checkpoint is on disk. Waits for a save in progress first.
        """
        began = time.perf_counter()
        self.wait()
        background = self.config.checkpoint.async_save
        if self._staging is None or self._staging.trainer is not trainer:
            self._staging = Staging(trainer)
        model, bases = model_fields(self.config.model), bases_of(trainer)
        updates = trainer.optimizer.step_count
        manifest = Manifest(position(state), updates, dict(state), model, {}, {}, {}, self._checksum, bases=bases)
        tensors = self._staging.snapshot(copy=background)
        snapshot = _Snapshot(self.folder / directory.step_name(manifest.step), tensors, manifest)
        if background:
            self._writer = threading.Thread(target=self._write_behind, args=(snapshot,), name="checkpoint", daemon=True)
            self._writer.start()
        else:
            self._succeeded = self._write(snapshot)
        return time.perf_counter() - began

    def wait(self) -> bool:
        """Wait for a save in progress; returns whether the last save succeeded. Raises its error if a peer has died."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash
        return self._succeeded

    def _write_behind(self, snapshot: _Snapshot) -> None:
        try:
            self._succeeded = self._write(snapshot)
        except BaseException as crash:  # handed to the main thread by `wait`
            self._succeeded, self._crash = False, crash

    def _write(self, snapshot: _Snapshot) -> bool:
        """Run the protocol above; returns True on every rank if the checkpoint is complete."""
        partial, first = directory.partial_path(snapshot.final, self._owner), self._peers.rank == 0
        fault = _attempt(lambda: self._prepare(snapshot.final)) if first else None
        if fault := self._peers.first(fault):
            return self._failed(snapshot, fault)
        report: dict[str, Any] = {}
        fault = _attempt(lambda: report.update(self._write_own(partial, snapshot)))
        reports = self._peers.exchange({"fault": fault, **report})
        faults = [f"rank {rank}: {report['fault']}" for rank, report in enumerate(reports) if report["fault"]]
        fault = "; ".join(faults)
        if first and not fault:
            fault = _attempt(lambda: self._commit(partial, snapshot, reports))
        if first and fault and partial.is_dir():
            directory.remove_calmly(partial)
        if fault := self._peers.first(fault):
            return self._failed(snapshot, fault)
        if first:
            self._prune()
        return True

    def _prepare(self, final: Path) -> None:
        self._verify()
        self.accept()
        directory.prepare(final, self._owner)

    def _failed(self, snapshot: _Snapshot, fault: str) -> bool:
        self.failures += 1
        self.last_failure = fault
        log.error(
            "checkpoint %s could not be saved (failure %d of this run, training goes on): %s",
            snapshot.final,
            self.failures,
            fault,
        )
        return False

    def _write_own(self, partial: Path, snapshot: _Snapshot) -> dict[str, Any]:
        """Write this rank's file; returns its name, size and pieces as JSON values."""
        assert self._staging is not None
        pieces = list(self._staging.tensors(snapshot.tensors))
        if not pieces:
            return {"pieces": []}
        if not partial.is_dir():
            raise FileNotFoundError(
                f"{partial} is not visible here; run.dir must be on a file system that all ranks share"
            )
        path = partial / f"rank_{self._peers.rank:05d}.safetensors"
        metadata = {"format": "pt", "step": str(snapshot.manifest.step)}
        with ThreadPoolExecutor(1) as beside:  # a disk takes longer; nothing is committed before both have ended
            checking = beside.submit(_require_finite, pieces)
            written = write_tensor_file(
                path, [(key, values) for _, _, key, values in pieces], metadata, snapshot.manifest.checksum
            )
            checking.result()
        entries = [
            (kind, box.name, box.shape, box.offset, box.size, checksum)
            for (kind, box, _, _), checksum in zip(pieces, written.tensor_checksums)
        ]
        return {"file": path.name, "bytes": written.size, "header": written.header_checksum, "pieces": entries}

    def _commit(self, partial: Path, snapshot: _Snapshot, reports: list[dict[str, Any]]) -> None:
        manifest, index = snapshot.manifest, Index()
        for report in reports:
            for kind, name, shape, offset, size, checksum in report["pieces"]:
                piece = Piece(report["file"], tuple(offset), tuple(size), checksum)
                add_piece(index, kind, name, shape, "F32", piece)
                manifest.files[piece.file] = (report["bytes"], report["header"])
        manifest.index = index
        manifest.run = self._identity.own if self._identity else ""
        manifest.check_tiling(partial)
        for name, content in self._extras():
            write_durably(partial / name, content)
            manifest.extras[name] = (len(content), manifest.checksum(content))
        self._verify()
        directory.commit(partial, snapshot.final, manifest)

    def _extras(self) -> list[tuple[str, bytes]]:
        extras = [("config.toml", to_toml(self.config).encode())]
        path = Path(self.config.data.tokenizer or "none")  # an empty path would be the working directory
        tokenizer = path / "tokenizer.json" if path.is_dir() else path
        if tokenizer.is_file():
            extras.append((f"tokenizer{tokenizer.suffix}", tokenizer.read_bytes()))
            settings = tokenizer.with_name("tokenizer_config.json")
            if tokenizer.suffix == ".json" and settings.is_file():
                extras.append((settings.name, settings.read_bytes()))
        return extras + self._template()

    def _template(self) -> list[tuple[str, bytes]]:
        """The chat template that the model was trained with, if it was trained on conversations or prompts."""
        data = self.config.data
        if self.config.objective.data_format == "text" or not data.tokenizer:
            return []
        from megalite.text.chat import ChatTemplate  # loads Jinja

        template = ChatTemplate.find(load_tokenizer(data.tokenizer), data.chat_template)
        return [] if template is None else [(TEMPLATE_FILE, template.source.encode())]

    def _prune(self) -> None:
        """Delete all but the newest `keep`, those due by `keep_every`, and an imported `step_00000000`."""
        keep, every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        passing = [
            path
            for step, path in directory.complete_checkpoints(self.folder)
            if step > 0 and not (every and step % every == 0)
        ]
        for path in passing[:-keep] if keep else []:
            if fault := _attempt(functools.partial(directory.retire, path)):
                log.warning("%s could not be deleted: %s", path, fault)

    # Loading

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending, the same on all ranks."""
        found = [step for step, _ in directory.complete_checkpoints(self.folder)] if self._peers.rank == 0 else []
        return self._peers.first(found)

    def load_latest(
        self, trainer: Checkpointable, *, fingerprint: Any = None, at_most: int | None = None
    ) -> dict[str, Any] | None:
        """Load the newest intact checkpoint (of step `at_most` or earlier); returns its state, or None.

        A damaged checkpoint is logged and set aside, and the previous one is used. `fingerprint` identifies the
        training data; it is compared with `state["fingerprint"]` unless `checkpoint.allow_data_change`. Raises
        `UserError` if all checkpoints are damaged, or if the newest belongs to another run, model or data.
        """
        self.wait()
        steps = [step for step in self.steps() if at_most is None or step <= at_most]
        if not steps:
            return None
        damaged: list[Path] = []
        for step in reversed(steps):
            path = self.folder / directory.step_name(step)
            try:
                state = self._load_checkpoint(trainer, path, optimizer=True, fingerprint=fingerprint, resume=True)
            except DamagedFile as error:
                log.error("checkpoint %s is unusable, trying the one before: %s", path, error)
                damaged.append(path)
                continue
            if self._peers.rank == 0 and damaged:
                self._verify()
                self.accept()
                for path in damaged:
                    log.error("the damaged checkpoint was set aside as %s", directory.set_aside(path))
            self._peers.first(None)
            return state
        raise UserError(
            f"all checkpoints in {self.folder} are damaged; restore one, or remove the directory to start afresh"
        )

    def load(self, trainer: Checkpointable, path: Path | str, *, optimizer: bool = True) -> dict[str, Any]:
        """Load another run's checkpoint, run directory, Hugging Face or PEFT directory; returns its state.

        The state is empty if only weights are loaded: a Hugging Face or PEFT directory, or `optimizer` False. Raises
        `UserError`.
        """
        self.wait()
        if not self._peers.first(is_huggingface(Path(path)) or is_peft(Path(path))):
            found: list[str] = []
            fault = _attempt(lambda: found.append(str(directory.find_checkpoint(Path(path)))))
            if fault := self._peers.first(fault):
                raise UserError(fault)
            target = Path(self._peers.first(found[0] if found else None))
            return self._load_checkpoint(trainer, target, optimizer=optimizer, fingerprint=None, resume=False)

        def read() -> None:
            with open_weights(path) as source:
                compare_model(source.model, Path(path), self.config.model, ADAPTABLE)
                begin_from(trainer, source, Path(path), optimizer=False)

        self._together(read)
        finish_load(trainer, 0)
        return {}

    def _load_checkpoint(
        self, trainer: Checkpointable, path: Path, *, optimizer: bool, fingerprint: Any, resume: bool
    ) -> dict[str, Any]:
        manifests: list[Manifest] = []

        def read() -> None:
            with CheckpointReader(path) as reader:
                manifests.append(reader.manifest)
                if resume and self._identity is not None:
                    self._identity.compare(reader.manifest.run, path)
                compare_model(reader.manifest.model, path, self.config.model, () if resume else ADAPTABLE)
                if optimizer:
                    compare_objective(reader, self.config.objective.kind, resume=resume)
                if fingerprint is not None and not self.config.checkpoint.allow_data_change:
                    compare_fingerprint(reader, fingerprint)
                if resume:
                    restore_bases(trainer, reader, self.config)
                    read_state(trainer, reader, optimizer=optimizer)
                else:
                    with open_checkpoint(reader, trainer.prefix) as source:
                        begin_from(trainer, source, path, optimizer=optimizer)
                if self._peers.rank == 0:
                    for name in reader.manifest.extras:
                        reader.extra(name)

        self._together(read)
        finish_load(trainer, manifests[0].updates if optimizer else 0)
        return manifests[0].state if optimizer else {}

    def _together(self, read: Callable[[], None]) -> None:
        """Run `read` on every rank; if it fails on any, raise that error on all. Refusals come before damage."""
        outcome: dict[str, Any] = {}
        try:
            read()
        except UserError as error:
            outcome = {"damaged": isinstance(error, DamagedFile), "fault": str(error)}
        faults = [entry for entry in self._peers.exchange(outcome) if entry]
        for kind, damaged in ((UserError, False), (DamagedFile, True)):
            for entry in faults:
                if entry["damaged"] == damaged:
                    raise kind(entry["fault"])

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, which a rollback has invalidated."""
        self.wait()
        if self._peers.rank == 0:
            self._verify()
            for found, path in directory.complete_checkpoints(self.folder):
                if found > step:
                    directory.retire(path)
        self._peers.first(None)

    # The end

    def close(self) -> None:
        """Wait for a save in progress and release the run directory."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
