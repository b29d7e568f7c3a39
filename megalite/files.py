"""The one way in which megalite puts a file in place, and the one lock.

A file under its final name is complete: it is written beside it under a temporary name, synced, and renamed. What goes
wrong on the way leaves the old file as it was and no temporary file behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megalite.errors import UserError

TEMPORARY_SUFFIX = ".partial"


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; nothing if the file system cannot."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path | str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises OSError for longer ones, and for what is no plain file:
    reading a pipe waits for ever, a device never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit} bytes", str(path))
    return content


@contextlib.contextmanager
def write_errors_named(path: Path | str) -> Iterator[None]:
    """Within, every failure to write (full disk, quota, size limit, permissions …) is a `UserError` naming `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_file(path: Path | str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends well, and vanishes when it does not.

    `durable` syncs file and directory, so that what is there after a power failure is the old file or the new one.
    Raises OSError; wrap it in `write_errors_named` if a user will read it.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(name, _mode_of(path))
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if durable:
        sync_directory(path.parent)


def write_atomically(path: Path | str, content: bytes | str, *, durable: bool = True) -> None:
    """`atomic_file` for content that is there already; text becomes UTF-8."""
    with atomic_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


class PendingFile:
    """`atomic_file` for writing outside a single block: `commit` gives the file its name, `abort` removes it.

    Removes the leftovers of killed processes first. Raises OSError.
    """

    def __init__(self, path: Path | str) -> None:
        for leftover in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        self._stack = contextlib.ExitStack()
        self.file = self._stack.enter_context(atomic_file(path))

    def commit(self) -> None:
        self._stack.close()

    def abort(self) -> None:
        """Remove the file, even if the last flush fails on a full disk; no effect after `commit`."""
        with contextlib.suppress(OSError):
            self._stack.__exit__(InterruptedError, InterruptedError(), None)


def _mode_of(path: Path) -> int:
    """The permissions of the file that is replaced, or what `open` would give a new one."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


@contextlib.contextmanager
def locked(path: Path | str, *, wait: bool = False) -> Iterator[bool]:
    """Hold the advisory lock (flock) of a lock file, made where it is missing and never followed through a link, or
    that of a directory.

    Yields whether the lock is held: always with `wait`, otherwise False at once where another process has it.
    """
    kind = os.O_RDONLY | os.O_DIRECTORY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(path, kind | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
