"""Safetensors files: reading untrusted ones, and writing durably.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}` and
the tensors' bytes, row-major, without gaps. Headers are not trusted until checked against the size of the file: a
hostile or truncated file raises one `DamagedFile` that names it, and never causes a huge allocation.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.checksum import Checksum
from megalite.checkpoint.direct import write_direct
from megalite.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000
_MAX_EXTENT = 1 << 48
_CHUNK = 1 << 30
_DIRECT_BYTES = 8 << 20
"""Files of this size and more are written past the page cache."""


class DamagedFile(UserError):
    """A file that is incomplete, altered or inconsistent with the other files; the message names it."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: `begin` and `end` are byte positions in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def is_extents(value: Any) -> bool:
    """Whether a JSON value is a list of plausible, non-negative dimensions."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(extent) is int and 0 <= extent < _MAX_EXTENT for extent in value)
    )


def open_regular(path: Path) -> int:
    """Open a regular file for reading; anything else (pipes and devices, which never end) raises `DamagedFile`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise DamagedFile(f"{str(path)!r}: {error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFile(f"{path} is not a regular file")
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; anything else raises `DamagedFile`."""
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise DamagedFile(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise DamagedFile(f"{path} has more than {limit} bytes, which no such file needs")
    return data


def parse_json(data: bytes, path: Path) -> Any:
    """The JSON value in `data`; invalid JSON raises a `DamagedFile` that names `path`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not valid JSON ({str(error)[:80]}): the file is damaged") from None


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> StoredTensor:
    """One header entry, checked: known dtype, plausible shape, byte range inside the file and of the right length."""
    if not isinstance(entry, dict):
        raise DamagedFile(f"{path}: header entry of {name!r} is not an object: the file is damaged")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DamagedFile(f"{path}: tensor {name!r} has dtype {dtype!r}; readable are {', '.join(DTYPES)}")
    if not (is_extents(shape) and is_extents(span)) or shape is None or span is None or len(span) != 2:
        raise DamagedFile(f"{path}: tensor {name!r} has an impossible shape or byte range: the file is damaged")
    begin, end = data_start + span[0], data_start + span[1]
    length = math.prod(shape) * DTYPES[dtype].itemsize
    if end > file_size:
        raise DamagedFile(f"{path}: tensor {name!r} reaches to byte {end}, but the file has {file_size}: truncated")
    if end - begin != length:
        raise DamagedFile(f"{path}: tensor {name!r} has {end - begin} bytes where its shape needs {length}: damaged")
    return StoredTensor(DTYPES[dtype], tuple(shape), begin, end)


class TensorFile:
    """A safetensors file opened for reading; `tensors` are its entries, `metadata` its free strings.

    `size` is that of the file in bytes, `header_checksum` that of the JSON header, if a checksum is given.

    Every method raises `DamagedFile` if the file is missing, truncated or inconsistent. Safe to read from several
    threads. Use as a context manager or call `close`.
    """

    def __init__(self, path: Path, checksum: Checksum | None = None) -> None:
        self.path, self._checksum = path, checksum
        self._descriptor = open_regular(path)
        try:
            self.size = os.fstat(self._descriptor).st_size
            self.metadata, self.tensors = self._header()
        except BaseException:
            self.close()
            raise

    def _header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        if self.size < 8:
            raise DamagedFile(f"{self.path} has {self.size} bytes, too few for a safetensors file: truncated")
        length = int.from_bytes(bytes(tensor_bytes(self._read(0, 8))), "little")
        if length > min(self.size - 8, _MAX_HEADER):
            raise DamagedFile(
                f"{self.path}: the header claims {length} bytes in a file of {self.size} (at most {_MAX_HEADER} are "
                "allowed): truncated, or not a safetensors file"
            )
        text = bytes(tensor_bytes(self._read(8, length)))
        self.header_checksum = self._checksum(text) if self._checksum else None
        header = parse_json(text, self.path)
        if not isinstance(header, dict):
            raise DamagedFile(f"{self.path}: the header is not a JSON object: the file is damaged")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise DamagedFile(f"{self.path}: the header's __metadata__ is not a JSON object: the file is damaged")
        start = 8 + length
        return metadata, {n: _stored_tensor(self.path, n, entry, start, self.size) for n, entry in header.items()}

    def _read(self, begin: int, length: int) -> Tensor:
        """`length` bytes from position `begin`, as uint8."""
        buffer = torch.empty(length, dtype=torch.uint8)
        self.read_bytes(begin, buffer)
        return buffer

    def read_bytes(self, begin: int, buffer: Tensor) -> None:
        """Fill a contiguous CPU tensor with the bytes from position `begin` on."""
        view = tensor_bytes(buffer)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done : done + _CHUNK]], begin + done)
            except OSError as error:
                raise DamagedFile(f"{self.path} cannot be read at byte {begin + done}: {error.strerror}") from None
            if count == 0:
                raise DamagedFile(f"{self.path} ends at byte {begin + done}, where more was promised: truncated")
            done += count

    def entry(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise DamagedFile(f"{self.path} has no tensor {name!r}: the file is damaged or of another checkpoint")
        return self.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first dimension of a tensor (all by default), in the dtype it is stored in."""
        entry = self.entry(name)
        if not entry.shape:
            return self._read(entry.begin, entry.end - entry.begin).view(entry.dtype).view(())
        stop = entry.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows [{start}, {stop}) of {name}, which has {entry.shape[0]}")
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = self._read(entry.begin + start * row, (stop - start) * row)
        return data.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A file that failed to open has no descriptor at all.
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done : done + _CHUNK])


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a file that holds these tensors back to back; padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes, checksum of the JSON header, and of each tensor's bytes."""

    size: int
    header_checksum: str
    tensor_checksums: list[str]


def write_tensor_file(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: dict[str, str], checksum: Checksum
) -> WrittenFile:
    """Write contiguous CPU tensors as a new safetensors file, synced when this returns.

    Checksums are computed from memory while writing. Raises OSError (disk full, no permission).
    """
    header = safetensors_header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors], metadata)
    contents = [tensor_bytes(tensor) for _, tensor in tensors]
    size = len(header) + sum(map(len, contents))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with ThreadPoolExecutor(1) as beside:
            checksums = beside.map(checksum, contents)
            if size >= _DIRECT_BYTES:
                write_direct(descriptor, [memoryview(header), *contents])
            else:
                for content in (memoryview(header), *contents):
                    _write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return WrittenFile(size, checksum(header[8:]), list(checksums))


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file, synced when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
