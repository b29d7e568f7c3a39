"""A cache of arrays, built once per node and memory-mapped by every process; content-keyed and atomic."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.errors import UserError
from megalite.files import locked, read_bounded, sync_directory, write_atomically, write_errors_named

Arrays = dict[str, np.ndarray]
logger = logging.getLogger(__name__)

WAIT_SECONDS = 3600.0
TELL_SECONDS = 15.0
POLL_SECONDS = 0.05
DTYPES = {name: np.dtype(name) for name in ("int16", "int32", "int64", "uint32")}
NPY_PREFIX = 10  # bytes: magic, version, and the length of the header


def content_key(**content: Any) -> str:
    """A cache key for arrays determined by `content` (JSON values), independent of paths."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def load_or_build(
    cache_dir: str | Path | None, key: str, build: Callable[[], Arrays], wait_seconds: float = WAIT_SECONDS
) -> Arrays:
    """The arrays of this key, memory-mapped from `cache_dir`; the first process to ask builds them, the others wait.

    Without a `cache_dir` they are built in memory. Raises `UserError` if the process that builds them has not finished
    after `wait_seconds` (naming it), or if the folder cannot be written.
    """
    if cache_dir is None:
        return build()
    folder = Path(cache_dir) / key
    if (arrays := _load(folder)) is not None:
        return arrays
    with write_errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with build_lock(folder.with_suffix(".lock"), wait_seconds):
        if (arrays := _load(folder)) is None:
            _store(folder, build())
            arrays = _load(folder)
    if arrays is None:
        raise UserError(f"{folder}: the index just written cannot be read back; check the disk or use another folder")
    return arrays


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Like `np.save`, but errors carry the system's reason."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)


def _load(folder: Path) -> Arrays | None:
    """The arrays of a complete folder, or None if it is missing or damaged (it is then rebuilt)."""
    try:
        expected = json.loads(read_bounded(folder / "arrays.json", 1 << 16))
        return {
            name: _map(folder / f"{name}.npy", DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in expected.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map a `.npy` file of this dtype and shape.

    Not with `np.load`: it parses the header as Python source, which is not thread-safe (CPython 3.11 raised
    SystemError). The header's content is in `arrays.json` too; only its length is read here.
    """
    with open(path, "rb") as file:
        prefix = file.read(NPY_PREFIX)
    offset = NPY_PREFIX + int.from_bytes(prefix[8:], "little")
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    if prefix[:8] != b"\x93NUMPY\x01\x00" or path.stat().st_size != offset + size:
        raise ValueError(f"{path} is damaged")
    if size == 0:
        return np.empty(shape, dtype)  # an empty array cannot be mapped
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def _store(folder: Path, arrays: Arrays) -> None:
    with publishing(folder, lambda folder: _load(folder) is not None) as temporary, write_errors_named(folder):
        temporary.mkdir()
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                write_array(file, array)
                file.flush()
                os.fsync(file.fileno())
        description = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
        write_atomically(temporary / "arrays.json", json.dumps(description))


@contextlib.contextmanager
def publishing(folder: Path, is_complete: Callable[[Path], bool]) -> Iterator[Path]:
    """A path beside `folder` at which to make a folder; it becomes `folder` when the block ends without an exception.

    What was left of an incomplete one is replaced. Where another process made a complete one first, that one is kept.
    """
    temporary = folder.with_suffix(f".tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        with write_errors_named(folder):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not is_complete(folder):  # another node, whose lock is invisible here, may have been first
                    raise
            sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def build_lock(path: Path, wait_seconds: float) -> Iterator[None]:
    """Hold the lock file `path`, which the system releases even if its holder is killed.

    On file systems without locks every process builds the arrays; they are identical, and one set is kept.
    """
    start, told = time.monotonic(), 0.0
    while True:
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(locked(path))
            except OSError as error:
                logger.warning("%s: cannot be locked (%s); building the data index unlocked", path, error.strerror)
                held = True
            if held:
                with contextlib.suppress(OSError):
                    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
                yield
                return
        waited = time.monotonic() - start
        holder = _holder(path)
        if waited > wait_seconds:
            raise UserError(
                f"{path}: waited {waited:.0f} s for {holder} to build the data index;"
                " stop that process if it hangs, then start again"
            )
        if waited - told > TELL_SECONDS:
            told = waited
            logger.warning("waiting for %s to build the data index %s (%.0f s so far)", holder, path.stem, waited)
        time.sleep(POLL_SECONDS)


def _holder(path: Path) -> str:
    try:
        return read_bounded(path, 1 << 12).decode(errors="replace")[:200] or "another process"
    except OSError:
        return "another process"
