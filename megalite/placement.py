"""A parameter knows its place in the global model.

Every parameter carries one `Placement`: which boxes of which global tensors this rank holds, where they lie in the
local tensor, and which ranks hold the same box. Initialisation, gradient reduction, the gradient norm, optimizer
sharding, checkpoints, Hugging Face export and the parity tests read only this; a new layer that declares its placement
gets all of them.

Global names are those of Hugging Face's Llama checkpoints (`model.layers.3.self_attn.q_proj.weight`), so that fused
local tensors (query/key/value, gate/up) are several boxes of plainly named global ones. Padded vocabulary rows belong
to no box: they are zero and stay zero. Data-parallel replication is universal and therefore not recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

_UINT64 = (1 << 64) - 1

Action = Callable[[], object]


@dataclass(frozen=True)
class Region:
    """An axis-aligned part of a tensor: where it begins, and how far it reaches."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has the region."""
        return len(self.offset) == len(self.size) == len(shape) and all(
            start >= 0 and length >= 0 and start + length <= extent
            for start, length, extent in zip(self.offset, self.size, shape)
        )

    def overlap(self, other: Region) -> Region | None:
        """What two regions of the same tensor share."""
        first = tuple(map(max, self.offset, other.offset))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size))
        size = tuple(end - start for start, end in zip(first, ends))
        return Region(first, size) if all(length > 0 for length in size) else None

    def of(self, tensor: Tensor, origin: Sequence[int]) -> Tensor:
        """This region of a tensor whose own first element lies at `origin`; a view."""
        for dim, (start, length, begin) in enumerate(zip(self.offset, self.size, origin)):
            tensor = tensor.narrow(dim, start - begin, length)
        return tensor


@dataclass(frozen=True)
class Box:
    """An axis-aligned piece of one global tensor inside one local parameter.

    `replicas` are the ranks (this one among them; same data coordinate) that hold this same box, ascending. `partial`
    says that each replica's gradient is one term of a sum; otherwise the replicas compute identical gradients.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    local_offset: tuple[int, ...]
    replicas: tuple[int, ...]
    partial: bool = False

    def view(self, local: Tensor) -> Tensor:
        """This box's part of a tensor that is shaped like the local parameter."""
        for dim, (start, length) in enumerate(zip(self.local_offset, self.size)):
            local = local.narrow(dim, start, length)
        return local

    def of(self, full: Tensor) -> Tensor:
        """This box's part of the whole global tensor."""
        for dim, (start, length) in enumerate(zip(self.offset, self.size)):
            full = full.narrow(dim, start, length)
        return full

    @property
    def owner(self) -> int:
        """The one replica that counts the box in the gradient norm and writes it to checkpoints."""
        return self.replicas[0]


@dataclass(frozen=True)
class Placement:
    """The boxes of one local parameter, and how its global tensors begin (`normal` with `std`, `ones`, `zeros`)."""

    boxes: tuple[Box, ...]
    init: str = "normal"
    std: float = 0.02


class PlacedParameter(nn.Parameter):
    """A parameter with its placement.

    `main_grad` (fp32, same shape) is where the parameter's gradient accumulates once gradient buckets have been built
    over the model; listeners are told of each accumulation. While `main_grad` is None, gradients go to `.grad`.
    `tied_to` names the parameter whose storage this one shares (a tied output layer in the same process).

    Buckets that hold values or gradients only for a while set `before_use` and `before_gradient`, which make them be
    there; layers therefore read their weights through `ready`. While `postpone` is set, layers hand it the work that
    computes their weight gradient instead of doing it (the W of zero-bubble schedules).
    """

    placement: Placement
    tied_to: PlacedParameter | None
    before_use: Action | None
    before_gradient: Action | None
    postpone: Callable[[Action], None] | None
    _main_grad: Tensor | None
    _listeners: list[Action]

    def __new__(cls, data: Tensor, placement: Placement) -> PlacedParameter:
        parameter = super().__new__(cls, data, requires_grad=True)
        parameter.placement = placement
        parameter.tied_to = None
        parameter.before_use = parameter.before_gradient = parameter.postpone = None
        parameter._main_grad = None
        parameter._listeners = []
        return parameter

    @property
    def main_grad(self) -> Tensor | None:
        if self._main_grad is None and self.before_gradient is not None:
            self.before_gradient()
        return self._main_grad

    @main_grad.setter
    def main_grad(self, gradient: Tensor | None) -> None:
        self._main_grad = gradient

    @property
    def ready(self) -> PlacedParameter:
        """This parameter, once its values are there."""
        if self.before_use is not None:
            self.before_use()
        return self

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices, not to norms and biases."""
        return self.dim() > 1

    def listen(self, listener: Action) -> None:
        """Call `listener()` after every accumulation into `main_grad`."""
        self._listeners.append(listener)

    def gradient_accumulated(self) -> None:
        for listener in self._listeners:
            listener()


def placed_parameters(module: nn.Module) -> Iterator[PlacedParameter]:
    """The module's parameters in definition order, each once; all of megalite's parameters are placed."""
    for parameter in module.parameters():
        assert isinstance(parameter, PlacedParameter)
        yield parameter


def split_evenly(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` when `total` is cut into `parts`, the first ones one longer where needed."""
    base, longer = divmod(total, parts)
    return index * base + min(index, longer), base + (index < longer)


def row_box(
    name: str,
    shape: tuple[int, ...],
    first_row: int,
    rows: int,
    local_row: int,
    replicas: Iterable[int],
    *,
    partial: bool = False,
) -> Box:
    """A box of whole rows: rows [first_row, first_row + rows) of the global tensor, from `local_row` on locally."""
    rest = shape[1:]
    zeros = (0,) * len(rest)
    return Box(name, shape, (first_row, *zeros), (rows, *rest), (local_row, *zeros), tuple(sorted(replicas)), partial)


def _row_generator(seed: int, name: str, row: int) -> np.random.Generator:
    """A stream that depends on (seed, name, row) alone: Philox, keyed by a hash of the first two, and the row."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = np.array([int.from_bytes(digest[:8], "little"), row & _UINT64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def initial_values(box: Box, placement: Placement, seed: int) -> Tensor:
    """The initial fp32 values of a box; the same global tensor results from any cut into boxes.

    A row is drawn whole and then cut, so that column-sharded weights agree as well.
    """
    if placement.init != "normal":
        return torch.full(box.size, 1.0 if placement.init == "ones" else 0.0)
    width = box.shape[1]
    columns = slice(box.offset[1], box.offset[1] + box.size[1])
    values = np.empty(box.size, dtype=np.float32)
    for i in range(box.size[0]):
        row = _row_generator(seed, box.name, box.offset[0] + i).standard_normal(width, dtype=np.float32)
        values[i] = row[columns]
    return torch.from_numpy(values).mul_(placement.std)


@torch.no_grad()
def initialise_parameter(parameter: PlacedParameter, seed: int) -> None:
    """Fill a parameter with the global initial values that its boxes name; padding becomes zero."""
    parameter.zero_()
    for box in parameter.placement.boxes:
        box.view(parameter).copy_(initial_values(box, parameter.placement, seed))


def initialise(module: nn.Module, seed: int) -> None:
    """`initialise_parameter` for all parameters of a module."""
    for parameter in placed_parameters(module):
        initialise_parameter(parameter, seed)


def flat_ranges(box: Box, local_shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The row-major element ranges [start, stop) that a box covers in its local parameter, as few as possible."""
    inner, dim = 1, len(local_shape)
    while dim > 0 and box.size[dim - 1] == local_shape[dim - 1]:
        dim -= 1
        inner *= local_shape[dim]
    if dim == 0:
        yield 0, inner
        return
    length = box.size[dim - 1] * inner
    outer = [range(start, start + size) for start, size in zip(box.local_offset[: dim - 1], box.size[: dim - 1])]
    for index in itertools.product(*outer):
        position = 0
        for coordinate, extent in zip((*index, box.local_offset[dim - 1]), local_shape[:dim]):
            position = position * extent + coordinate
        yield position * inner, position * inner + length


def range_boxes(box: Box, local_shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The parts of `box` inside the row-major range [start, stop) of its local parameter, as boxes.

    Yields (box, flat position of its first element); every part is contiguous in the local parameter, so that a flat
    optimizer shard can be described, saved and loaded like any other piece of the global tensor.
    """
    for first, last in flat_ranges(box, local_shape):
        first, last = max(first, start), min(last, stop)
        while first < last:
            size, count = _largest_block(local_shape, box, first, last)
            where = np.unravel_index(first, local_shape)
            shift = tuple(int(i) - origin for i, origin in zip(where, box.local_offset))
            offset = tuple(origin + s for origin, s in zip(box.offset, shift))
            local_offset = tuple(int(i) for i in where)
            yield dataclasses.replace(box, offset=offset, size=size, local_offset=local_offset), first
            first += count


def _largest_block(shape: tuple[int, ...], box: Box, first: int, last: int) -> tuple[tuple[int, ...], int]:
    """Size and element count of the largest contiguous block of `box` that begins at `first` and ends by `last`."""
    where = [int(i) for i in np.unravel_index(first, shape)]
    size = [1] * len(shape)
    inner = 1
    for dim in reversed(range(len(shape))):
        room = box.local_offset[dim] + box.size[dim] - where[dim]
        size[dim] = min(room, (last - first) // inner)
        if size[dim] < shape[dim] or where[dim] != 0:
            return tuple(size), size[dim] * inner
        inner *= shape[dim]
    return tuple(size), inner
