"""A rank is a coordinate: the mesh of pipeline, data, expert, context and tensor axes, and the groups along them.

`tp` runs fastest and `pp` slowest, so that tensor-parallel peers, which talk most, are neighbours on one machine.
A `Mesh` is a value that is built once and passed down; no code in megalite looks up a global process group. Training
communicates through `Group` alone, in terms of ranks and tensors; starting, watching and ending the processes
(`megalite.runtime`, `observe.watch`, the doctor) use `torch.distributed` directly.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")

AXES = ("pp", "dp", "ep", "cp", "tp")

DATA_AXES = ("dp", "ep", "cp")
"""The axes along which ranks hold the same weights and train on different data."""

EXPERT_DATA_AXES = ("dp", "cp")
"""The same for experts, which are split over `ep`."""

# Renamed in torch 2.13; both names are needed while older versions are supported.
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_BACKGROUND_LIMIT = timedelta(hours=1)
"""Timeout until `set_timeout`: by how much one rank may take longer than another to read a checkpoint."""

_DIRECT_BYTES, _DIRECT_GATHER, _DIRECT_REDUCTION = 1 << 16, 8, 2
"""On CPUs, collectives run as point-to-point transfers from this many bytes per rank, and up to this group size (for
an all-gather and for a reduce-scatter)."""

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Work(Protocol):
    """A communication in flight. Its tensors must be neither read nor written until `wait` has returned."""

    def wait(self) -> object: ...


class _Done:
    def wait(self) -> None:
        return None


DONE: Work = _Done()


class _Timed:
    """A backend's work handle; time spent in `wait` is added to its group's `waited_seconds`."""

    def __init__(self, group: Group, work: dist.Work, *limit: timedelta) -> None:
        self._group, self._work, self._limit = group, work, limit

    def wait(self) -> None:
        began = time.perf_counter()
        with self._group.observe_wait():
            self._work.wait(*self._limit)
        self._group.waited_seconds += time.perf_counter() - began


class _Direct:
    """A collective made of point-to-point transfers: complete once all have arrived and `finish` has run."""

    def __init__(self, transfers: Sequence[Work], finish: Callable[[], object]) -> None:
        self._transfers, self._finish = transfers, finish

    def wait(self) -> None:
        for transfer in self._transfers:
            transfer.wait()
        self._finish()


class Group:
    """An ordered tuple of ranks that this rank belongs to, and the communications among them.

    Every method starts its communication and returns a `Work`; nothing is complete before `wait()`.
    A group of one rank needs no backend: its communications are local copies. `waited_seconds` is the total host time
    spent in waits; the straggler is the rank with the least of it. `observe_wait` wraps every wait.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, handle: dist.ProcessGroup | None) -> None:
        self.ranks = ranks
        self.index = ranks.index(rank)
        self.handle = handle
        self.waited_seconds = 0.0
        self._limit: timedelta | None = None
        self.observe_wait: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def size(self) -> int:
        return len(self.ranks)

    def set_timeout(self, seconds: float) -> None:
        """Make every later communication fail after this time."""
        self._limit = timedelta(seconds=seconds)
        if self.handle is not None:
            dist.distributed_c10d._set_pg_timeout(self._limit, self.handle)

    def _transfer_limit(self, tensor: Tensor) -> tuple[timedelta, ...]:
        """gloo's transfers keep the timeout the group was created with unless `wait` is passed another."""
        return (self._limit,) if self._limit is not None and tensor.device.type == "cpu" else ()

    def _direct(self, part: Tensor, most: int) -> bool:
        """Whether a collective with this `part` per rank is faster as all-to-all transfers: gloo's collectives reach
        0.3 to 1.3 GB/s, its transfers 2 to 5. Limited to `most` ranks; for reductions to two, where the order of
        summation cannot matter.

        The transfers bypass overrides in subclasses: a subclass that wraps operations sees one collective."""
        return part.device.type == "cpu" and self.size <= most and part.nbytes >= _DIRECT_BYTES

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """Reduce `tensor` over the group, in place. `op` is `sum` or `max`."""
        if self.size == 1:
            return DONE
        return _Timed(self, dist.all_reduce(tensor, op=_REDUCTIONS[op], group=self.handle, async_op=True))

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        """Concatenate every rank's `tensor` [n, ...] along the first dimension into `output` [size * n, ...]."""
        if self.size == 1:
            output.copy_(tensor)
            return DONE
        if self._direct(tensor, _DIRECT_GATHER):
            parts = output.view(self.size, -1)
            others = [index for index in range(self.size) if index != self.index]
            transfers = [Group.receive(self, parts[other], other) for other in others]
            transfers += [Group.send(self, tensor, other) for other in others]
            return _Direct(transfers, functools.partial(parts[self.index].copy_, tensor.view(-1)))
        return _Timed(self, _all_gather_single(output, tensor, group=self.handle, async_op=True))

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Work:
        """Sum `tensor` [size * n, ...] over the group; `output` [n, ...] receives this rank's part of the sum."""
        if self.size == 1:
            output.copy_(tensor)
            return DONE
        if self._direct(output, _DIRECT_REDUCTION):
            parts, other = tensor.view(2, -1), 1 - self.index
            arriving = torch.empty_like(parts[other])
            transfers = (Group.receive(self, arriving, other), Group.send(self, parts[other], other))
            own, total = parts[self.index], output.view(-1)
            return _Direct(transfers, lambda: torch.add(own, arriving, out=total))
        return _Timed(self, _reduce_scatter_single(output, tensor, group=self.handle, async_op=True))

    def all_to_all(self, output: Tensor, tensor: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Work:
        """Send each rank its rows of `tensor` and receive its rows in `output`, both in the order of the ranks.

        `leaving[i]` rows go to rank i of the group and `arriving[i]` come from it; any of them may be 0.
        """
        if self.size == 1:
            output.copy_(tensor)
            return DONE
        work = dist.all_to_all_single(output, tensor, list(arriving), list(leaving), group=self.handle, async_op=True)
        assert work is not None
        return _Timed(self, work)

    def gather_json(self, value: Any, device: torch.device = CPU) -> list[Any]:
        """Every rank's JSON value, in the order of the ranks; complete on return. `device` is where the group's
        tensors are. Meant for short values."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.empty(self.size, dtype=torch.int64, device=device)
        self.all_gather(lengths, torch.tensor([len(text)], device=device)).wait()
        width = int(lengths.max())
        padded = torch.zeros(width, dtype=torch.uint8, device=device)
        everything = torch.empty(self.size * width, dtype=torch.uint8, device=device)
        padded[: len(text)] = text.to(device)
        self.all_gather(everything, padded).wait()
        rows = everything.cpu().view(self.size, width)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths.tolist())]

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        """Overwrite `tensor` with the one on the rank at index `source` of the group."""
        if self.size == 1:
            return DONE
        return _Timed(self, dist.broadcast(tensor, src=self.ranks[source], group=self.handle, async_op=True))

    def send(self, tensor: Tensor, to: int) -> Work:
        """Send `tensor` to the rank at index `to`; transfers between two ranks arrive in the order they were sent."""
        work = dist.isend(tensor, self.ranks[to], group=self.handle)
        assert work is not None
        return _Timed(self, work, *self._transfer_limit(tensor))

    def receive(self, tensor: Tensor, source: int) -> Work:
        """Receive into `tensor` from the rank at index `source`."""
        work = dist.irecv(tensor, self.ranks[source], group=self.handle)
        assert work is not None
        return _Timed(self, work, *self._transfer_limit(tensor))

    def pass_on(self, output: Tensor, tensor: Tensor) -> Work:
        """Send `tensor` to the next rank of the ring while the previous one's arrives in `output`; all ranks call it
        alike."""
        after, before = (self.index + 1) % self.size, (self.index - 1) % self.size
        if tensor.device.type != "cuda":
            return _Direct((self.receive(output, before), self.send(tensor, after)), lambda: None)
        # One launch for both: NCCL runs what two ranks exchange one after the other, and two sends would block.
        arriving = dist.P2POp(dist.irecv, output, self.ranks[before], self.handle)
        leaving = dist.P2POp(dist.isend, tensor, self.ranks[after], self.handle)
        return _Direct([_Timed(self, work) for work in dist.batch_isend_irecv([leaving, arriving])], lambda: None)

    def exchange(self, tensor: Tensor, other: int) -> Tensor:
        """Swap tensors of the same shape with the rank at index `other`, which must call this too; complete on return.

        The lower rank sends first, so this cannot deadlock where a send blocks until its receive is posted.
        """
        arriving = torch.empty_like(tensor)
        if self.index < other:
            self.send(tensor, other).wait()
            self.receive(arriving, other).wait()
        else:
            self.receive(arriving, other).wait()
            self.send(tensor, other).wait()
        return arriving

    def sum_over_members(self, tensor: Tensor, members: tuple[int, ...]) -> None:
        """Sum `tensor` in place over `members` (ascending group indices, including this rank's); complete on return.

        A proper subset exchanges tensors pairwise and adds them in index order, so all members get identical bits.
        Meant for small sets.
        """
        if len(members) == self.size:
            self.all_reduce(tensor).wait()
            return
        terms = {self.index: tensor.clone()}
        for other in members:
            if other == self.index:
                continue
            terms[other] = self.exchange(terms[self.index], other)
        tensor.copy_(terms[members[0]])
        for other in members[1:]:
            tensor.add_(terms[other])


GroupFactory = Callable[[tuple[int, ...], int], Group]


def create_group(ranks: tuple[int, ...], rank: int, timeout: timedelta | None = None) -> Group:
    """Create the process group of `ranks`.

    Only its members take part, so each rank of a 16,384-rank job creates just the handful of groups it belongs to.
    torch names such a group after its ranks and the number of groups created so far, so every rank of the job must
    create the same number of groups in the same order: one along each axis, never one for a few ranks only.
    """
    if len(ranks) == 1:
        return Group(ranks, rank, None)
    if len(ranks) == dist.get_world_size():
        return Group(ranks, rank, dist.group.WORLD)
    handle = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    return Group(ranks, rank, handle)


@dataclass(frozen=True)
class Mesh:
    """Sizes of the five axes and this rank's place in them.

    `ep` is a factor of data parallelism: `dp * ep` ranks read different samples, and experts are sharded over `ep`.
    `make_group` builds a group from its ranks; tests inject faulty groups through it.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1
    rank: int = 0
    device: torch.device = CPU
    make_group: GroupFactory = create_group
    _groups: dict[tuple[str, ...], Group] = field(default_factory=dict, repr=False, compare=False)
    _background: list[Group] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a mesh of {self.size} ranks")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.pp, self.dp, self.ep, self.cp, self.tp)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def coordinate(self) -> dict[str, int]:
        """This rank's index along every axis."""
        index, remainder = {}, self.rank
        for axis, size in reversed(list(zip(AXES, self.shape))):
            remainder, index[axis] = divmod(remainder, size)
        return index

    def index(self, axis: str) -> int:
        return self.coordinate[axis]

    def rank_at(self, **indices: int) -> int:
        """The rank that differs from this one only in the given axes: `mesh.rank_at(pp=0)`."""
        coordinate, rank = self.coordinate | indices, 0
        for axis, size in zip(AXES, self.shape):
            rank = rank * size + coordinate[axis]
        return rank

    def ranks_along(self, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from this one only in `axes`, in rank order."""
        spans = [range(size) if axis in axes else (self.index(axis),) for axis, size in zip(AXES, self.shape)]
        return tuple(self.rank_at(**dict(zip(AXES, indices))) for indices in itertools.product(*spans))

    def group(self, *axes: str) -> Group:
        """The group along the product of `axes` through this rank; `mesh.group("dp", "cp")`.

        Created on first request, collectively: request groups at construction, in the same order on every rank.
        """
        if axes not in self._groups:
            self._groups[axes] = self.make_group(self.ranks_along(*axes), self.rank)
        return self._groups[axes]

    @property
    def alone(self) -> Group:
        """This rank by itself."""
        return Group((self.rank,), self.rank, None)

    @property
    def samples_size(self) -> int:
        """The number of ranks that a batch's samples are divided among."""
        return self.dp * self.ep

    @property
    def samples_index(self) -> int:
        """This rank's index among them."""
        return self.index("dp") * self.ep + self.index("ep")

    def data_group(self) -> Group:
        """The ranks that hold the same weights and train on different data."""
        return self.group(*DATA_AXES)

    @property
    def world(self) -> Group:
        return self.group(*AXES)

    def background_group(self) -> Group:
        """A new gloo group of all ranks for a background thread; its tensors are in host memory.

        Created collectively. It shares the timeout of the other groups, but its waits are not counted as training time.
        """
        handle = dist.new_group(backend="gloo", timeout=_BACKGROUND_LIMIT) if self.size > 1 else None
        self._background.append(Group(tuple(range(self.size)), self.rank, handle))
        return self._background[-1]

    def warm_up(self) -> None:
        """Use every connection once, in an order on which all ranks agree.

        NCCL creates a communicator lazily, and both ends must join; in the middle of a pipeline step, two ranks could
        each block on a different one. So: first all groups, in the order they were created, then each pair of
        neighbours in the pipeline ring (including last and first), the lower rank sending first.
        """
        for axes, group in self._groups.items():
            # Stages communicate in pairs, so a communicator for the whole pipeline would only cost memory. With two
            # stages the group is the pair, and it also sums the gradients of tied weights.
            if axes != ("pp",) or group.size == 2:
                group.all_reduce(torch.zeros(1, device=self.device)).wait()
        pipeline = self._groups.get(("pp",))
        if pipeline is None or pipeline.size == 1:
            return
        pairs = {tuple(sorted((rank, (rank + 1) % pipeline.size))) for rank in range(pipeline.size)}
        for low, high in sorted(pairs):
            if pipeline.index in (low, high):
                pipeline.exchange(torch.zeros(1, device=self.device), high + low - pipeline.index)

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of every later communication of all groups created so far."""
        for group in (*self._groups.values(), *self._background):
            group.set_timeout(seconds)

    def observe_waits(self, observe: Callable[[tuple[str, ...]], AbstractContextManager[None]]) -> None:
        """Wrap every later wait of the groups created so far in `observe(axes)`, for the timeline."""
        for axes, group in self._groups.items():
            group.observe_wait = functools.partial(observe, axes)

    @contextmanager
    def waits_unobserved(self) -> Iterator[None]:
        """No wait in this context is wrapped: a recorded one has no time of its own."""
        observers = {axes: group.observe_wait for axes, group in self._groups.items()}
        for group in self._groups.values():
            group.observe_wait = nullcontext
        try:
            yield
        finally:
            for axes, observe in observers.items():
                self._groups[axes].observe_wait = observe

    @property
    def waited_seconds(self) -> float:
        """Time this rank has spent waiting for others, over all its groups."""
        return sum(group.waited_seconds for group in self._groups.values())
