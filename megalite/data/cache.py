"""Arrays built once per node and memory-mapped by every process: content-keyed, atomic, with a wait that tells."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.data.indexed import sync_folder, writing
from megalite.errors import UserError
from megalite.files import private_folder

Arrays = dict[str, np.ndarray]
logger = logging.getLogger(__name__)

WAIT_SECONDS = 3600.0
TELL_SECONDS = 15.0
POLL_SECONDS = 0.05


def content_key(**content: Any) -> str:
    """A name for what `content` (JSON values) determines; the path of the data has no part in it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def load_or_build(
    cache_dir: str | Path | None, key: str, build: Callable[[], Arrays], wait_seconds: float = WAIT_SECONDS
) -> Arrays:
    """The arrays of this key, memory-mapped from `cache_dir`; the first process to ask builds them, others wait.

    Without a `cache_dir` they are built in memory. Raises `UserError` naming the process waited for when it has not
    finished after `wait_seconds`, or when the folder cannot be written.
    """
    if cache_dir is None:
        return build()
    folder = Path(cache_dir) / key
    if (arrays := _load(folder)) is not None:
        return arrays
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock"), wait_seconds):
        if (arrays := _load(folder)) is None:
            _store(folder, build())
            arrays = _load(folder)
    if arrays is None:
        raise UserError(f"{folder}: the index just written cannot be read back; check the disk or use another folder")
    return arrays


def _load(folder: Path) -> Arrays | None:
    """The arrays of a complete folder, or None where there is none or a file of it is damaged (it is then rebuilt)."""
    try:
        expected: Mapping[str, list] = json.loads((folder / "arrays.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in expected}
    except (OSError, ValueError):
        return None
    if any([str(array.dtype), list(array.shape)] != expected[name] for name, array in arrays.items()):
        return None
    return {name: np.asarray(array) for name, array in arrays.items()}


def _store(folder: Path, arrays: Arrays) -> None:
    temporary = folder.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        with writing(folder):
            temporary.mkdir()
            for name, array in arrays.items():
                with _synced(temporary / f"{name}.npy") as file:
                    np.save(file, array, allow_pickle=False)
            description = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
            with _synced(temporary / "arrays.json") as file:
                file.write(json.dumps(description).encode())
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(temporary, folder)
            except OSError:
                if _load(folder) is None:  # another node, whose lock is not seen here, may have been first
                    raise
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path, wait_seconds: float) -> Iterator[None]:
    """Hold the lock file `path`, which the system releases even when its holder is killed."""
    descriptor = _open_lock(path)
    try:
        start, told = time.monotonic(), 0.0
        while not _try_lock(descriptor):
            waited = time.monotonic() - start
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            if waited > wait_seconds:
                raise UserError(
                    f"{path}: waited {waited:.0f} s for {holder} to build the data index;"
                    " stop that process if it hangs, then start again"
                )
            if waited - told > TELL_SECONDS:
                told = waited
                logger.warning("waiting for %s to build the data index %s (%.0f s so far)", holder, path.stem, waited)
            time.sleep(POLL_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """A descriptor that can be locked: beside the cache, or per node where that file system knows no locks."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor
    except BlockingIOError:
        return descriptor
    except OSError:
        os.close(descriptor)
    return os.open(private_folder() / f"{content_key(path=str(path.resolve()))}.lock", flags, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
