"""A parameter knows its place in the global model.

Every parameter carries one `Placement`: which boxes of which global tensors this rank holds, their offsets in the
local tensor, and which ranks hold the same box. Initialisation, gradient reduction, the gradient norm, optimizer
sharding, checkpoints and the parity tests read nothing else, so a new layer that declares its placement gets all of
them.

Global names follow Hugging Face's Llama checkpoints (`model.layers.3.self_attn.q_proj.weight`); a fused local tensor
(query/key/value, gate/up) holds one box of each of the global tensors it fuses. Padding rows of the vocabulary belong
to no box: they are zero and stay zero. Every parameter is replicated over the axes in `reduce`, by default all data
axes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from megalite.mesh import DATA_AXES

Action = Callable[[], object]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Region:
    """An axis-aligned region of a tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether the region lies within a tensor of this shape."""
        return len(self.offset) == len(self.size) == len(shape) and all(
            start >= 0 and length >= 0 and start + length <= extent
            for start, length, extent in zip(self.offset, self.size, shape)
        )

    def overlap(self, other: Region) -> Region | None:
        """The intersection with another region of the same tensor; None if it is empty."""
        first = tuple(map(max, self.offset, other.offset))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size))
        size = tuple(end - start for start, end in zip(first, ends))
        return Region(first, size) if all(length > 0 for length in size) else None

    def of(self, tensor: Tensor, origin: Sequence[int]) -> Tensor:
        """This region as a view of `tensor`, which starts at `origin` of the global tensor."""
        for dim, (start, length, begin) in enumerate(zip(self.offset, self.size, origin)):
            tensor = tensor.narrow(dim, start - begin, length)
        return tensor


@dataclass(frozen=True)
class Box:
    """An axis-aligned box of one global tensor inside one local parameter.

    `replicas` are the ranks at the same data coordinate that hold this box, ascending, including this one. With
    `partial`, each replica's gradient is one term of a sum; otherwise all replicas compute identical gradients.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    local_offset: tuple[int, ...]
    replicas: tuple[int, ...]
    partial: bool = False

    def view(self, local: Tensor) -> Tensor:
        """This box as a view of a tensor shaped like the local parameter."""
        for dim, (start, length) in enumerate(zip(self.local_offset, self.size)):
            local = local.narrow(dim, start, length)
        return local

    def of(self, full: Tensor) -> Tensor:
        """This box as a view of the full global tensor."""
        for dim, (start, length) in enumerate(zip(self.offset, self.size)):
            full = full.narrow(dim, start, length)
        return full

    @property
    def owner(self) -> int:
        """The one replica that counts the box in the gradient norm and writes it to checkpoints."""
        return self.replicas[0]


@dataclass(frozen=True)
class Placement:
    """The boxes of one local parameter, how its global tensors are initialised, and how it is trained.

    `init` is `normal` or `uniform` (around 0, with standard deviation `std`), `ones` or `zeros`. `reduce`
    names the mesh axes over which the gradient is summed: those whose ranks see different data. `role` says what the
    parameter is (`matrix`, `vector`, `embedding`, `output`, `adapter`); optimizers select by it.
    """

    boxes: tuple[Box, ...]
    init: str = "normal"
    std: float = 0.02
    reduce: tuple[str, ...] = DATA_AXES
    role: str = "matrix"


class ParameterStore(Protocol):
    """Where a parameter's values and gradient live: a bucket, which may hold either only temporarily.

    `ready` says that the values can be read without asking. `derived` is what has been made of them, by the parameter's
    id; it is emptied when they change or leave.
    """

    ready: bool
    derived: dict[int, Any]

    def gather(self, parameter: PlacedParameter) -> None:
        """Return once the parameter's values are available."""
        ...

    def allocate_gradients(self) -> None:
        """Set the `main_grad` of all parameters of the store, and whether it is stale."""
        ...

    def gradient_added(self, parameter: PlacedParameter) -> None:
        """A micro-batch's gradient (or one of several parts of it) has been added to `main_grad`."""
        ...


class PlacedParameter(nn.Parameter):
    """A parameter with its placement.

    Once gradient buckets have been built over the model, `store` is the parameter's bucket: layers read the weight
    through `gathered()`, add its gradient to `grad_buffer()` (fp32, same shape) and then call `gradient_added()`.
    `main_grad` is that buffer while it is allocated; while `stale`, it holds what no longer counts. Without a store,
    gradients go to `.grad` as usual.

    `tied_to` is the parameter whose storage this one shares (a tied output layer in the same process). While `delay`
    is set, layers pass it a closure that computes their weight gradient instead of computing it (the W of zero-bubble
    schedules).
    """

    placement: Placement
    tied_to: PlacedParameter | None
    store: ParameterStore | None
    main_grad: Tensor | None
    stale: bool
    delay: Callable[[Action], None] | None

    def __new__(cls, data: Tensor, placement: Placement) -> PlacedParameter:
        parameter = super().__new__(cls, data, requires_grad=True)
        parameter.placement = placement
        parameter.tied_to = parameter.store = parameter.main_grad = parameter.delay = None
        parameter.stale = False
        return parameter

    def gathered(self) -> PlacedParameter:
        """This parameter, once its values are available; may wait for an all-gather."""
        if self.store is not None and not self.store.ready:
            self.store.gather(self)
        return self

    def derived(self, make: Callable[[], Made]) -> Made:
        """What `make` makes of the values, which must be available: made once, and kept by the store until they change
        or are released. Without a store, which would know, it is made at every call. A parameter has one such thing."""
        if self.store is None:
            return make()
        kept = self.store.derived
        if id(self) not in kept:
            kept[id(self)] = make()
        made: Made = kept[id(self)]
        return made

    @property
    def has_grad_buffer(self) -> bool:
        """Whether its gradient is added to a buffer, allocated or not, and not left to autograd."""
        return self.main_grad is not None or self.store is not None

    def grad_buffer(self) -> Tensor | None:
        """The buffer to add the gradient to, allocated or cleared if need be; None if autograd should accumulate."""
        total, stale = self.grad_target()
        if stale:
            assert total is not None
            total.zero_()
        return total

    def grad_target(self) -> tuple[Tensor | None, bool]:
        """For a caller that can overwrite, which saves two passes over memory: (the buffer, whether it must be
        overwritten instead of being added to)."""
        if self.main_grad is None and self.store is not None:
            self.store.allocate_gradients()
        stale, self.stale = self.stale, False
        return self.main_grad, stale

    def gradient_added(self) -> None:
        if self.store is not None:
            self.store.gradient_added(self)

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices, not to norms and biases."""
        return self.dim() > 1

    @property
    def name(self) -> str:
        """The first global name, for messages."""
        return self.placement.boxes[0].name if self.placement.boxes else "a parameter of padding alone"


def placed_parameters(module: nn.Module) -> Iterator[PlacedParameter]:
    """The module's parameters in definition order, each once; every parameter in megalite is placed."""
    for parameter in module.parameters():
        assert isinstance(parameter, PlacedParameter)
        yield parameter


def split_evenly(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` when `total` is split into `parts`; the first parts are one longer if uneven."""
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


def flat_ranges(box: Box, local_shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The row-major element ranges [start, stop) that a box covers in its local parameter, merged where adjacent."""
    # Trailing dimensions that the box spans entirely are contiguous in memory, together with the extent of the box in
    # the dimension before them: that is one range, repeated for every index of the dimensions further out.
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

    Yields (box, flat position of its first element). Every part is contiguous in the local parameter, so a flat
    optimizer shard can be described, saved and loaded as boxes of the global tensor.
    """
    # A ZeRO shard starts and ends anywhere, even in the middle of a row. Cutting greedily yields, for a matrix, at most
    # the rest of the first row, the whole rows as one box, and the beginning of the last row.
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
    # Grow from the innermost dimension outwards. A dimension that is not filled from its beginning to its end stops the
    # growth, since the next element in memory would lie outside the block; all dimensions further out keep size 1.
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
