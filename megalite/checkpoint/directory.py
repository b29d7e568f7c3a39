"""Names of checkpoints on disk, and the moves that make them appear and vanish as a whole.

A checkpoint has its final name, `step_00000100`, if and only if it is complete: it is written under another name,
synced and renamed; it is deleted by renaming it first. Order is by step number, never by a clock.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megalite.checkpoint.files import sync_directory, write_durably
from megalite.checkpoint.manifest import MANIFEST, Manifest
from megalite.errors import UserError

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL, _DELETED, _REPLACED, _DAMAGED = ".partial", ".deleted", ".replaced", ".damaged"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def partial_path(final: Path, owner: str = "") -> Path:
    """Where a checkpoint lies while it is written; `owner` keeps two writers of the same one apart."""
    return final.with_name(final.name + (f".{owner}" if owner else "") + _PARTIAL)


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, ascending; empty where the folder does not exist."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: one itself, or the newest of a run directory. Raises UserError."""
    if (path / MANIFEST).exists() or (_STEP.fullmatch(path.name) and path.is_dir()):
        return path
    for folder in (path / CHECKPOINTS, path):
        checkpoints = complete_checkpoints(folder)
        if checkpoints:
            return checkpoints[-1][1]
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory or a checkpoint inside one")
    raise UserError(f"{path} holds no checkpoint ({MANIFEST}, or {CHECKPOINTS}/step_…)")


def prepare(final: Path, owner: str = "") -> Path:
    """An empty directory to write the checkpoint into; the remains of an interrupted attempt are removed."""
    partial = partial_path(final, owner)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, make everything durable and give the checkpoint its final name.

    An older checkpoint of the same step (from before a rollback) is replaced.
    """
    write_durably(partial / MANIFEST, manifest.to_bytes())
    sync_directory(partial)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def retire(path: Path) -> None:
    """Delete a complete checkpoint: first its name, then its content."""
    deleted = path.with_name(path.name + _DELETED)
    if deleted.exists():
        shutil.rmtree(deleted)
    path.rename(deleted)
    shutil.rmtree(deleted)


def set_aside(path: Path) -> Path:
    """Take a damaged checkpoint out of the order, its content kept for whoever wants to look; its new path."""
    number = 0
    while (aside := path.with_name(f"{path.name}{_DAMAGED}{number or ''}")).exists():
        number += 1
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def sweep(folder: Path) -> list[Path]:
    """Remove what interrupted saves and deletions left behind; only for the holder of the run directory's lock.

    A checkpoint that was to be replaced, and whose successor did not arrive, gets its name back.
    """
    if not folder.is_dir():
        return []
    for path in folder.glob("*" + _REPLACED):
        if not (final := path.with_name(path.name.removesuffix(_REPLACED))).exists():
            path.rename(final)
    left = [path for path in sorted(folder.iterdir()) if path.name.endswith((_PARTIAL, _DELETED, _REPLACED))]
    for path in left:
        shutil.rmtree(path)
    return left
