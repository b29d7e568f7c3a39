"""Run ids: every run gets one at its first start; it is stored in run.dir and in every checkpoint.

`run.id` holds the run's own id and, one per line, those of other runs whose checkpoints it was allowed to continue
from. File names and steps prove nothing: a complete checkpoint of another run, copied into place, is refused. Imported
weights and checkpoints of older versions carry no id, and are accepted.
"""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path

from megalite.checkpoint.directory import complete_checkpoints
from megalite.checkpoint.manifest import MANIFEST, Manifest
from megalite.checkpoint.tensor_file import DamagedFile
from megalite.errors import UserError
from megalite.files import read_bounded, write_atomically

log = logging.getLogger(__name__)

IDENTITY = "run.id"
_MAX_BYTES = 1 << 16


class RunIdentity:
    """The id of the run whose directory contains `checkpoints`; on rank 0. Nothing is written before `keep`."""

    def __init__(self, checkpoints: Path, allow_others: bool) -> None:
        self._path, self._allow_others = checkpoints.parent / IDENTITY, allow_others
        self.kept = False
        known = self._read() or self._from_checkpoints(checkpoints)
        self.own, self._accepted = known[0], set(known)

    def _read(self) -> list[str]:
        try:
            known = read_bounded(self._path, _MAX_BYTES).decode("ascii").split()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self._path} cannot be read: {error}; restore it, or delete it") from None
        if not known or not all(re.fullmatch("[0-9a-f]{32}", line) for line in known):
            raise UserError(f"{self._path} holds no id of a run; restore it, or delete it")
        return known

    def _from_checkpoints(self, folder: Path) -> list[str]:
        """If `run.id` is missing: the id that the checkpoints agree on, or a new one if they have none."""
        found: dict[str, Path] = {}
        for _, path in complete_checkpoints(folder):
            try:
                run = Manifest.from_file(path / MANIFEST).run
            except DamagedFile:
                continue
            if run:
                found.setdefault(run, path)
        if len(found) > 1 and not self._allow_others:
            raise UserError(
                f"{self._path} is missing, and checkpoints of several runs lie here: "
                f"{', '.join(map(str, found.values()))}; remove the others', "
                "or take them all with checkpoint.allow_other_run = true"
            )
        return list(found)[::-1] or [uuid.uuid4().hex]

    def compare(self, run: str, checkpoint: Path) -> None:
        """Raise `UserError` if `checkpoint` belongs to another run."""
        if not run or run in self._accepted:
            return
        if not self._allow_others:
            raise UserError(
                f"{checkpoint} is of another run: its id is {run}, that in {self._path} is {self.own}; remove it, "
                "start a new run.dir from it with checkpoint.load, or take it with checkpoint.allow_other_run = true"
            )
        self._accepted.add(run)
        if self.kept:
            self.keep()

    def keep(self) -> None:
        """Write `run.id`. A full disk does not end the run: the checkpoints carry the id too."""
        content = "".join(f"{run}\n" for run in (self.own, *sorted(self._accepted - {self.own})))
        try:
            if not self._path.exists() or self._path.read_text() != content:
                write_atomically(self._path, content)
            self.kept = True
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
