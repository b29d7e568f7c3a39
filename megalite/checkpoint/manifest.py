"""The manifest of a checkpoint: everything that is not a tensor, and the location of every piece of every tensor.

A checkpoint directory holds safetensors files of *pieces*, boxes of global tensors under keys such as
`weight/model.norm.weight/0`, and one `manifest.json`, written last: step, run, model, the loop's state, the files with
their sizes, and for each kind of tensor (`weight`, the fp32 master weights; and what the optimizer keeps, under its own
names) the global shape and the pieces with their checksums. Which checksum that is, the manifest says in `checksum`,
and the checksums stand under that name (megalite/checkpoint/checksum.py); version 1 does not say it and means crc32.

The manifest carries a CRC-32 of itself in any case: it is checked before anything in the manifest is believed, the name
of a checksum included, and costs nothing for so short a text.

`Manifest.from_file` trusts nothing: file names must stay inside the directory, and pieces must tile every tensor.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalite.checkpoint.checksum import CRC32, Checksum, find_checksum
from megalite.checkpoint.tensor_file import DTYPES, DamagedFile, is_extents, parse_json, read_regular
from megalite.errors import UserError

MANIFEST = "manifest.json"
WEIGHT = "weight"
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")

_FORMAT, _VERSION, _READABLE = "megalite checkpoint", 2, (1, 2)
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_RUN = re.compile("[0-9a-f]{0,64}")
_PREFIX = re.compile(rb'\{"crc32": "([0-9a-f]{8})", "checkpoint": ')
_SUFFIX = b"}\n"
_MAX_BYTES = 1 << 31


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor; `file` is the name of the checkpoint's file that holds it."""

    file: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    checksum: str


@dataclass
class Entry:
    """One global tensor of one kind: `dtype` as safetensors names it, and the pieces that tile it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[Piece] = field(default_factory=list)


Index = dict[str, dict[str, Entry]]
"""By kind, by global name."""


def piece_key(kind: str, name: str, offset: Sequence[int]) -> str:
    """The key of a piece inside its safetensors file."""
    return f"{kind}/{name}/{','.join(str(start) for start in offset)}"


def add_piece(index: Index, kind: str, name: str, shape: Sequence[int], dtype: str, piece: Piece) -> None:
    """Add a piece to the index; raises ValueError if the tensor has another shape or dtype there."""
    entry = index.setdefault(kind, {}).setdefault(name, Entry(tuple(shape), dtype))
    if entry.shape != tuple(shape) or entry.dtype != dtype:
        raise ValueError(f"{kind} {name}: pieces of {entry.shape} {entry.dtype} and of {tuple(shape)} {dtype}")
    entry.pieces.append(piece)


def tiling_fault(shape: Sequence[int], pieces: Sequence[Piece]) -> str | None:
    """None if the pieces cover every element of the tensor exactly once, else what is wrong."""
    for piece in pieces:
        if len(piece.offset) != len(shape) or len(piece.size) != len(shape):
            return f"a piece has {len(piece.offset)} dimensions, the tensor {len(shape)}"
        if any(start + length > extent for start, length, extent in zip(piece.offset, piece.size, shape)):
            return f"the piece at {list(piece.offset)} of size {list(piece.size)} reaches beyond shape {list(shape)}"
    held, needed = sum(math.prod(piece.size) for piece in pieces), math.prod(shape)
    if len(pieces) > 1 and shape:
        starts = np.array([piece.offset for piece in pieces], dtype=np.int64)
        stops = starts + np.array([piece.size for piece in pieces], dtype=np.int64)
        for i in range(len(pieces) - 1):
            shared = (np.maximum(starts[i], starts[i + 1 :]) < np.minimum(stops[i], stops[i + 1 :])).all(axis=1)
            if shared.any():
                return f"the pieces at {starts[i].tolist()} and {starts[i + 1 + int(shared.argmax())].tolist()} overlap"
    if held != needed:
        return f"pieces hold {held} of its {needed} elements"
    return None


@dataclass
class Manifest:
    """The description of a checkpoint.

    `updates` counts optimizer updates so far; `model` holds the fields of `ModelConfig`; `state` is the training
    loop's. `files` are the tensor files, with (bytes, checksum of the header), `extras` further files (config.toml, a
    tokenizer) with (bytes, checksum); `checksum` computes these and the pieces'. `run` is the id of the run that wrote
    it; empty for imported weights and for checkpoints of older versions. `bases` says for adapters, by the prefix of
    the model, which weights they belong to: `source` (a path) and `sha256`.
    """

    step: int
    updates: int
    state: dict[str, Any]
    model: dict[str, Any]
    files: dict[str, tuple[int, str]]
    extras: dict[str, tuple[int, str]]
    index: Index
    checksum: Checksum
    run: str = ""
    bases: dict[str, dict[str, str]] = field(default_factory=dict)

    def shapes(self, kind: str = WEIGHT) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.index.get(kind, {}).items()}

    def check_tiling(self, path: Path) -> None:
        """Raise `DamagedFile` if a tensor has holes or overlaps, or optimizer state does not match the weights."""
        for kind, entries in self.index.items():
            for name, entry in entries.items():
                fault = tiling_fault(entry.shape, entry.pieces)
                if fault:
                    raise DamagedFile(f"{path}: {kind} of {name}: {fault}")
        weights = self.shapes()
        for kind in self.index:
            odd = sorted(name for name, shape in self.shapes(kind).items() if weights.get(name) != shape)
            if odd:
                raise DamagedFile(f"{path}: {kind} and {WEIGHT} describe different tensors, {odd[0]} among them")

    def to_bytes(self) -> bytes:
        """The file's content. Raises ValueError if the state is not valid JSON (NaN, infinities)."""
        key = self.checksum.name
        body = {
            "format": _FORMAT,
            "version": _VERSION,
            "step": self.step,
            "updates": self.updates,
            "run": self.run,
            "bases": self.bases,
            "state": self.state,
            "model": self.model,
            "checksum": key,
            "files": _files_json(self.files, f"header_{key}"),
            "extras": _files_json(self.extras, key),
            "tensors": {
                kind: {
                    name: {
                        "shape": entry.shape,
                        "dtype": entry.dtype,
                        "pieces": [_piece_json(p, key) for p in entry.pieces],
                    }
                    for name, entry in entries.items()
                }
                for kind, entries in self.index.items()
            },
        }
        text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        return b'{"crc32": "%08x", "checkpoint": ' % zlib.crc32(text) + text + _SUFFIX

    @classmethod
    def from_file(cls, path: Path) -> Manifest:
        """Read and check a manifest; raises `DamagedFile`."""
        data = read_regular(path, _MAX_BYTES)
        prefix = _PREFIX.match(data)
        if prefix is None or not data.endswith(_SUFFIX):
            raise DamagedFile(f"{path} does not begin and end like a manifest: truncated or damaged")
        text = data[prefix.end() : -len(_SUFFIX)]
        if zlib.crc32(text) != int(prefix[1], 16):
            raise DamagedFile(f"{path} does not match its own checksum: damaged")
        return _Parser(path).manifest(parse_json(text, path))


def _files_json(files: Mapping[str, tuple[int, str]], key: str) -> dict[str, Any]:
    return {name: {"bytes": size, key: checksum} for name, (size, checksum) in files.items()}


def _piece_json(piece: Piece, key: str) -> dict[str, Any]:
    return {"file": piece.file, "offset": piece.offset, "size": piece.size, key: piece.checksum}


class _Parser:
    """From JSON to a `Manifest`, one check for every field."""

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, CRC32

    def require(self, condition: bool, fault: str) -> None:
        if not condition:
            raise DamagedFile(f"{self.path}: {fault}")

    def object(self, parent: Any, key: str) -> dict[str, Any]:
        value = parent.get(key)
        self.require(isinstance(value, dict), f"{key!r} is missing or not an object")
        return value

    def count(self, value: Any, what: str) -> int:
        self.require(type(value) is int and 0 <= value < 1 << 62, f"{what} is {str(value)[:40]!r}, not a count")
        return value

    def checksum(self, value: Any, what: str) -> str:
        pattern = f"[0-9a-f]{{{self.kind.digits}}}"
        self.require(isinstance(value, str) and re.fullmatch(pattern, value) is not None, f"{what}: no checksum")
        return value

    def file_name(self, name: str) -> str:
        plain = _FILE_NAME.fullmatch(name) is not None and name != MANIFEST
        self.require(plain, f"file name {name[:80]!r} is not a plain name inside the checkpoint")
        return name

    def manifest(self, body: Any) -> Manifest:
        self.require(isinstance(body, dict), "not an object")
        self.require(body.get("format") == _FORMAT, f"format is {str(body.get('format'))[:40]!r}, not {_FORMAT!r}")
        version = body.get("version")
        if type(version) is not int or version not in _READABLE:
            raise UserError(
                f"{self.path} has version {str(version)[:20]}, this megalite reads up to {_VERSION}: use the one "
                "that it came from"
            )
        self.kind = find_checksum(body.get("checksum", CRC32.name), self.path)
        key = self.kind.name
        files, extras = self.files(body, "files", f"header_{key}"), self.files(body, "extras", key)
        tensors = self.object(body, "tensors")
        plain = WEIGHT in tensors and all(_KIND.fullmatch(kind) for kind in tensors)
        self.require(plain, f"kinds of tensors are {sorted(tensors)[:5]}")
        index = {
            kind: {name: self.entry(name, value, files) for name, value in self.object(tensors, kind).items()}
            for kind in tensors
        }
        step, updates = (self.count(body.get(name), name) for name in ("step", "updates"))
        run = body.get("run", "")
        self.require(isinstance(run, str) and _RUN.fullmatch(run) is not None, "run is not the id of a run")
        state, model = self.object(body, "state"), self.object(body, "model")
        bases = self.bases(body.get("bases", {}))
        result = Manifest(step, updates, state, model, files, extras, index, self.kind, run, bases)
        result.check_tiling(self.path)
        return result

    def bases(self, value: Any) -> dict[str, dict[str, str]]:
        self.require(isinstance(value, dict), "'bases' is not an object")
        for prefix, base in value.items():
            known = isinstance(base, dict) and base.keys() == {"source", "sha256"}
            plain = known and all(isinstance(text, str) and "\0" not in text for text in base.values())
            self.require(plain, f"the base of {prefix[:80]!r} has no source and sha256")
        return value

    def files(self, body: Any, key: str, checksum: str) -> dict[str, tuple[int, str]]:
        result = {}
        for name, value in self.object(body, key).items():
            self.require(isinstance(value, dict), f"{name[:80]!r} in {key!r} is not an object")
            size, digits = self.count(value.get("bytes"), name), self.checksum(value.get(checksum), name)
            result[self.file_name(name)] = (size, digits)
        return result

    def entry(self, name: str, value: Any, files: Container[str]) -> Entry:
        self.require(isinstance(value, dict), f"{name}: not an object")
        shape, dtype, pieces = value.get("shape"), value.get("dtype"), value.get("pieces")
        self.require(is_extents(shape) and math.prod(shape) < 1 << 50, f"{name}: impossible shape")
        self.require(isinstance(dtype, str) and dtype in DTYPES, f"{name}: dtype {str(dtype)[:20]!r} is not known")
        self.require(isinstance(pieces, list), f"{name}: no pieces")
        return Entry(tuple(shape), dtype, [self.piece(name, piece, files) for piece in pieces])

    def piece(self, name: str, value: Any, files: Container[str]) -> Piece:
        self.require(isinstance(value, dict), f"{name}: a piece is not an object")
        file, offset, size = value.get("file"), value.get("offset"), value.get("size")
        self.require(isinstance(file, str) and file in files, f"{name}: piece in unlisted file {str(file)[:80]!r}")
        self.require(is_extents(offset) and is_extents(size) and 0 not in size, f"{name}: impossible offset or size")
        return Piece(file, tuple(offset), tuple(size), self.checksum(value.get(self.kind.name), name))
