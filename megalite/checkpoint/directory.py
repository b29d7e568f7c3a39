"""Names of checkpoints on disk, and the renames that make them appear and disappear atomically.

A checkpoint has its final name, `step_00000100`, if and only if it is complete: it is written under another name,
synced and renamed; it is deleted by renaming it first. Checkpoints are ordered by step number, never by time.

Only directories under names that this module assigns are ever deleted. A symbolic link to a checkpoint elsewhere is
deleted as a link; files, and directories under other names, are left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megalite.checkpoint.manifest import MANIFEST, Manifest
from megalite.checkpoint.tensor_file import write_durably
from megalite.errors import UserError
from megalite.files import sync_directory

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step_([0-9]{8,})")
_PARTIAL, _DELETED, _REPLACED, _DAMAGED = ".partial", ".deleted", ".replaced", ".damaged"
_LEFT = re.compile(r"step_[0-9]{8,}((\.[^/]+-[0-9]+(-[0-9a-f]{8})?)?\.partial|\.(deleted|replaced)[0-9]*)")
_TEMPORARY = (_PARTIAL, _DELETED, _REPLACED)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def partial_path(final: Path, owner: str = "") -> Path:
    """The directory of a checkpoint while it is written; `owner` distinguishes two writers of the same step."""
    return final.with_name(final.name + (f".{owner}" if owner else "") + _PARTIAL)


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, ascending; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`: `path` itself, or the newest one of a run directory. Raises UserError."""
    if (path / MANIFEST).exists() or (_STEP.fullmatch(path.name) and path.is_dir()):
        return path
    for folder in (path / CHECKPOINTS, path):
        checkpoints = complete_checkpoints(folder)
        if checkpoints:
            return checkpoints[-1][1]
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory or a checkpoint inside one")
    raise UserError(f"{path} holds no checkpoint ({MANIFEST}, or {CHECKPOINTS}/step_…)")


def remove(path: Path) -> None:
    """Delete a directory of ours, or a symbolic link to one; raises OSError, also for plain files."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def remove_calmly(path: Path) -> None:
    """`remove`, but what cannot be deleted is logged and left for the next sweep."""
    try:
        remove(path)
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)


def _free_name(path: Path, suffix: str) -> Path:
    """`path` with a suffix, and a number if that name is taken."""
    number = 0
    while os.path.lexists(name := path.with_name(f"{path.name}{suffix}{number or ''}")):
        number += 1
    return name


def prepare(final: Path, owner: str = "") -> Path:
    """Create an empty directory to write the checkpoint into; removes the remains of an interrupted attempt."""
    partial = partial_path(final, owner)
    if partial.is_dir() or partial.is_symlink():
        remove(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be made: {error.strerror}") from None
    return partial


def commit(partial: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, make everything durable and give the checkpoint its final name.

    An older checkpoint of the same step (from before a rollback) is replaced; anything else under that name is renamed.
    """
    write_durably(partial / MANIFEST, manifest.to_bytes())
    sync_directory(partial)
    replaced = None
    if final.is_dir():
        replaced = final.rename(_free_name(final, _REPLACED))
    elif os.path.lexists(final):
        log.warning("%s is no checkpoint: set aside as %s", final, set_aside(final))
    partial.rename(final)
    sync_directory(final.parent)
    if replaced is not None:
        remove_calmly(replaced)


def retire(path: Path) -> None:
    """Delete a complete checkpoint: first its name, then its content."""
    remove_calmly(path.rename(_free_name(path, _DELETED)))


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts, keeping its content; returns its new path."""
    aside = path.rename(_free_name(path, _DAMAGED))
    sync_directory(path.parent)
    return aside


def restore(folder: Path) -> None:
    """Rename back a checkpoint that was being replaced when its replacement failed to appear."""
    for path in _left(folder):
        final, replaced, _ = path.name.rpartition(_REPLACED)
        if replaced and not os.path.lexists(path.with_name(final)):
            path.rename(path.with_name(final))


def sweep(folder: Path) -> list[Path]:
    """Remove the remains of interrupted saves and deletions; only for the holder of the run directory's lock.

    Returns what was found. Similar names that are not ours are logged and left alone; nothing here stops a start.
    """
    restore(folder)
    left = list(_left(folder))
    for path in left:
        remove_calmly(path)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(_TEMPORARY) and path not in left:
            log.warning("%s was not made by a checkpoint's save: left alone", path)
    return left


def _left(folder: Path) -> Iterator[Path]:
    """Directories under our temporary names, and symbolic links (to checkpoints elsewhere)."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(folder.iterdir()):
            if _LEFT.fullmatch(path.name) and (path.is_dir() or path.is_symlink()):
                yield path
