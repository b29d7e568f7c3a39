"""Groups that misbehave as NCCL may, so that gloo on one machine, or one process, shows the races of a cluster.

gloo finishes small transfers almost at once and NCCL runs in stream order, so code that forgets a `wait()`, reads a
buffer early or reuses one that is still being sent works by luck on one and fails on the other. A `ChaosGroup`, around
a group of gloo's or of `tests.support.virtual`,

- works on copies: until `wait()` a receiving buffer holds poison (NaN and a number in turn);
- starts late and completes late, by random delays that differ from rank to rank;
- complains when a buffer in flight was written, or when an operation was never waited for.

    groups = ChaosGroups(seed=rank)
    mesh = Mesh(..., make_group=groups)
    ...
    groups.verify()   # at the end: raises for operations that nobody waited for
"""

from __future__ import annotations

import inspect
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megalite.mesh import Group, GroupFactory, Work, create_group
from megalite.parallel.virtual_parts import TreeGroup

LONGEST_DELAY_SECONDS = 0.002


class RaceError(AssertionError):
    """Code touched a buffer in flight, or left an operation without `wait()`."""


@dataclass
class ChaosGroups:
    """Makes chaos groups around those of `make`; pass it as `Mesh(make_group=...)`. Give every rank its own seed.

    `pause`, called with seconds, lets the other ranks go on.
    """

    seed: int = 0
    make: GroupFactory = create_group
    pause: Callable[[float], None] = time.sleep
    in_flight: dict[int, str] = field(default_factory=dict)
    sums_up_the_tree: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.numbers = itertools.count()

    def __call__(self, ranks: tuple[int, ...], rank: int) -> Group:
        kind = ChaosTree if self.sums_up_the_tree else ChaosGroup
        return kind(ranks, rank, self.make(ranks, rank), self)

    def verify(self) -> None:
        """Raise RaceError if any operation has not been waited for."""
        if self.in_flight:
            raise RaceError("never waited for:\n" + "\n".join(sorted(set(self.in_flight.values()))))

    def delay(self) -> None:
        """Pause, in one call of three."""
        if self.random.random() < 1 / 3:
            self.pause(self.random.random() * LONGEST_DELAY_SECONDS)


class ChaosGroup(Group):
    """A `Group` whose operations run on copies and touch the caller's tensors only when they are waited for."""

    def __init__(self, ranks: tuple[int, ...], rank: int, inner: Group, chaos: ChaosGroups) -> None:
        super().__init__(ranks, rank, inner.handle)
        self.inner, self.chaos = inner, chaos

    def set_timeout(self, seconds: float) -> None:
        self.inner.set_timeout(seconds)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        copy = _copy(tensor)
        return _InFlight(self, "all_reduce", partial(self.inner.all_reduce, copy, op), output=(tensor, copy))

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        result, source = _copy(output), _copy(tensor)
        start = partial(self.inner.all_gather, result, source)
        return _InFlight(self, "all_gather", start, output=(output, result), input=tensor)

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Work:
        result, source = _copy(output), _copy(tensor)
        start = partial(self.inner.reduce_scatter, result, source)
        return _InFlight(self, "reduce_scatter", start, output=(output, result), input=tensor)

    def all_to_all(self, output: Tensor, tensor: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Work:
        result, source = _copy(output), _copy(tensor)
        start = partial(self.inner.all_to_all, result, source, arriving, leaving)
        return _InFlight(self, "all_to_all", start, output=(output, result), input=tensor)

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        copy = _copy(tensor)
        start = partial(self.inner.broadcast, copy, source)
        if source == self.index:
            return _InFlight(self, "broadcast", start, input=tensor)
        return _InFlight(self, "broadcast", start, output=(tensor, copy))

    def send(self, tensor: Tensor, to: int) -> Work:
        return _InFlight(self, "send", partial(self.inner.send, _copy(tensor), to), input=tensor)

    def receive(self, tensor: Tensor, source: int) -> Work:
        copy = _copy(tensor)
        start = partial(self.inner.receive, copy, source)
        return _InFlight(self, "receive", start, output=(tensor, copy))


class ChaosTree(TreeGroup, ChaosGroup):
    """The same of the groups of `train.invariant`."""


class _InFlight:
    """One operation: its buffer is poisoned when it starts and filled, after a look at it, when it is waited for.

    `output` is the caller's receiving tensor and the copy that is really communicated; `input` the caller's other one.
    """

    def __init__(
        self,
        group: ChaosGroup,
        name: str,
        start: Callable[[], Work],
        output: tuple[Tensor, Tensor] | None = None,
        input: Tensor | None = None,
    ) -> None:
        self.group, self.chaos, self.done = group, group.chaos, False
        self.name = f"{name} among ranks {group.ranks} started at {_caller()}"
        self.key = next(self.chaos.numbers)
        self.chaos.in_flight[self.key] = self.name
        self.output = output
        self.input = (
            None if input is None or (output and _overlap(input, output[0])) else (input, input.detach().clone())
        )
        self.chaos.delay()
        self.work = start()
        if output:
            _poison(output[0])

    def wait(self) -> None:
        if self.done:
            return
        self.chaos.delay()
        began = time.perf_counter()
        with self.group.observe_wait():
            self.work.wait()
        self.group.waited_seconds += time.perf_counter() - began
        self.done = True
        del self.chaos.in_flight[self.key]
        if self.input and not torch.equal(_bytes(self.input[0]), _bytes(self.input[1])):
            raise RaceError(f"the input of {self.name} was written before wait()")
        if self.output:
            if not _is_poisoned(self.output[0]):
                raise RaceError(f"the output of {self.name} was written before wait()")
            self.output[0].data.copy_(self.output[1])


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise RaceError(f"a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not contiguous")
    return tensor.detach().clone()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _poison_of(tensor: Tensor) -> Tensor:
    """What a buffer in flight holds: NaN, which shows in whatever is computed from it, and at every other place a
    number, since what is added to NaN leaves no trace of having been written."""
    if not tensor.dtype.is_floating_point:
        value = 0 if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).min + 3
        return torch.full_like(tensor, value)
    poison = torch.full_like(tensor, float("nan"))
    poison.view(-1)[1::2] = 1234.0
    return poison


def _poison(tensor: Tensor) -> None:
    tensor.data.copy_(_poison_of(tensor.detach()))  # `.data`: not an update that autograd should see


def _is_poisoned(tensor: Tensor) -> bool:
    return torch.equal(_bytes(tensor), _bytes(_poison_of(tensor.detach())))


def _overlap(one: Tensor, other: Tensor) -> bool:
    first, second = ((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (one, other))
    return first[0] < second[1] and second[0] < first[1]


def _caller() -> str:
    """File and line, outside this file, that started the operation."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "nowhere"
