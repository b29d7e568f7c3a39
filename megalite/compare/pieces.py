"""What a rank records: pieces of global tensors, each with its name, its box and its place in the order of execution.

Layouts cut tensors differently, so nothing is compared as a rank holds it. A piece says which box of which global
tensor it is; two runs meet in the global tensor. Where tensors are too large to keep, both keep the same sample of
their elements: in every dimension the same indices, a function of name and shape alone. What a rank holds of the sample
is again a box.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.files import write_atomically

START, INPUT, FORWARD, LOSS, BACKWARD, NORM, RATE, STATE, WEIGHT = range(9)
"""The phases of a step, in the order of execution; START is before the first."""

INDEX, VALUES = "pieces.jsonl", "values.bin"

MASTER = "master"
"""The name of fp32 master weights among an optimizer's state."""

Turn = tuple[float, ...]


@dataclass(frozen=True)
class Port:
    """What is recorded of a step: one global tensor.

    `kind` is `input`, `weight`, `activation`, `loss`, `activation_gradient`, `gradient`, `grad_norm`, `lr` or
    `optimizer_state`; `operation` is what has just been computed when the tensor is there. `turn` sorts the tensors of
    a step by execution, as one process would run them: phase, then the pipeline stage (in backward its negative), then
    the place within the stage.
    """

    name: str
    kind: str
    step: int
    operation: str
    turn: Turn

    @property
    def key(self) -> tuple[int, str, str]:
        return self.step, self.kind, self.name


@dataclass(frozen=True)
class Piece:
    """A box of a recorded tensor of global `shape`, as one rank holds it.

    `values` are those of the sample, and `corner` is where they begin in the sampled tensor. `partial`: the tensor is
    the sum of all pieces with this box. `bits` is the sum of a hash of each element and its global index, over the
    whole box, mod 2^64: the sums of all boxes that make up a tensor are equal where the bits are, however it is cut.
    None where no hashes were asked for.
    """

    port: Port
    rank: int
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    values: np.ndarray
    corner: tuple[int, ...]
    partial: bool = False
    bits: int | None = None


@dataclass(frozen=True)
class Sampling:
    """At most `limit` elements of a tensor are kept (0: all), and a hash of all of them if `hashed`."""

    limit: int = 0
    hashed: bool = False

    def indices(self, name: str, shape: Sequence[int]) -> list[np.ndarray]:
        """The sampled indices of each dimension, ascending."""
        counts = list(shape)
        while self.limit and math.prod(counts) > self.limit:
            longest = max(range(len(counts)), key=lambda dim: counts[dim])
            others = math.prod(counts) // counts[longest]
            shorter = max(1, min(counts[longest] - 1, self.limit // others), counts[longest] // 2)
            counts[longest] = shorter
        seed = int.from_bytes(hashlib.blake2b(f"{name} {tuple(shape)}".encode(), digest_size=8).digest())
        draw = np.random.default_rng(seed)
        return [
            np.arange(extent) if count == extent else np.sort(draw.choice(extent, count, replace=False))
            for count, extent in zip(counts, shape)
        ]

    def take(
        self, name: str, shape: Sequence[int], offset: Sequence[int], values: Tensor
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """The sampled elements of a box, on the host, and where they begin in the sampled tensor."""
        corner = []
        for dim, (indices, start) in enumerate(zip(self.indices(name, shape), offset)):
            extent = values.shape[dim]
            first, stop = np.searchsorted(indices, (start, start + extent))
            corner.append(int(first))
            if stop - first < extent:
                inside = torch.from_numpy(indices[first:stop] - start).to(values.device)
                values = values.index_select(dim, inside)
        return as_array(values), tuple(corner)


def as_array(values: Tensor) -> np.ndarray:
    """On the host: fp32, or the type itself where that is fp64 or integer; a copy."""
    values = values.detach()
    wide = values if values.dtype in (torch.float64, torch.int64) else values.float()
    # A copy before numpy sees it: storage that was shown to numpy cannot be freed and filled again, as ZeRO-3 does.
    return wide.cpu().clone(memory_format=torch.contiguous_format).numpy()


def bits_of(values: Tensor, shape: Sequence[int], offset: Sequence[int]) -> int:
    """The hash of a box of a tensor of this `shape` (see `Piece`); splitmix64's finaliser over bits and index."""
    array = as_array(values)
    bits = array.view(np.uint32 if array.dtype == np.float32 else np.uint64).astype(np.uint64)
    index = np.zeros((), dtype=np.uint64)
    for extent, start, length in zip(shape, offset, array.shape):
        index = index[..., None] * np.uint64(extent) + np.arange(start, start + length, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mix(bits ^ _mix(index.reshape(array.shape)))
        return int(mixed.sum(dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def write_pieces(folder: Path, pieces: Iterable[Piece]) -> None:
    """One rank's recording as two files: lines that describe the pieces, and their values one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, position = [], 0
    with (folder / VALUES).open("wb") as file:
        for piece in pieces:
            fields: dict[str, Any] = {name: getattr(piece, name) for name in piece.__dataclass_fields__}
            values = fields.pop("values")
            fields["port"] = asdict(piece.port)
            lines.append(
                json.dumps(fields | {"dtype": values.dtype.str, "extent": values.shape, "position": position}) + "\n"
            )
            file.write(values.tobytes())
            position += values.nbytes
    write_atomically(folder / INDEX, "".join(lines), durable=False)


def read_pieces(folder: Path) -> Iterator[Piece]:
    """What `write_pieces` wrote; values are read when they are looked at."""
    path = folder / VALUES
    content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.uint8)
    with (folder / INDEX).open(encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            dtype, extent, position = np.dtype(fields.pop("dtype")), fields.pop("extent"), fields.pop("position")
            port = fields.pop("port")
            port["turn"] = tuple(port["turn"])
            for name in ("shape", "offset", "size", "corner"):
                fields[name] = tuple(fields[name])
            values = content[position : position + math.prod(extent) * dtype.itemsize].view(dtype).reshape(extent)
            yield Piece(port=Port(**port), values=values, **fields)
