"""All ranks of a mesh in one process, one after the other: collectives without processes or a backend.

Each rank is a thread, and exactly one thread runs at a time: a rank runs until it waits for something that others have
not sent yet, then the next one goes on. So a job is deterministic, and ranks that wait for each other for ever are
found at once and named with what they wait for, as are ranks that call different collectives or pass other shapes.
Sums are taken in the order of the ranks. Ranks take turns in their order, or in that of a `random.Random`.

    world = World(8)
    results = world.run(function)      # function(rank, make_group); Mesh(..., make_group=make_group)
"""

from __future__ import annotations

import contextvars
import functools
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalite.mesh import DONE, Group, GroupFactory, Work


class Stuck(AssertionError):
    """No rank can go on, or two ranks of a group do not ask for the same."""


class _Ended(BaseException):
    """Another rank has failed."""


@dataclass
class _Deposit:
    """What the ranks have brought to one collective."""

    asked: tuple[Any, ...]
    brought: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, Sequence[int]] = field(default_factory=dict)
    taken: int = 0


class World:
    """`size` ranks."""

    def __init__(self, size: int, chance: random.Random | None = None) -> None:
        self.size, self._chance = size, chance
        self.deposits: dict[tuple[Any, ...], _Deposit] = {}
        self.messages: dict[tuple[Any, ...], deque[Tensor]] = defaultdict(deque)
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._back = threading.Semaphore(0)
        self._waiting: dict[int, tuple[str, Callable[[], bool]]] = {}
        self._failure: BaseException | None = None
        self._rank: contextvars.ContextVar[int] = contextvars.ContextVar("rank")

    def run(self, function: Callable[[int, GroupFactory], Any]) -> list[Any]:
        """The results of `function(rank, make_group)` in the order of the ranks."""
        results: list[Any] = [None] * self.size

        def live(rank: int) -> None:
            self._rank.set(rank)
            self._turns[rank].acquire()
            try:
                if self._failure is None:
                    results[rank] = function(rank, self._factory())
            except _Ended:
                pass
            except BaseException as error:
                self._failure = self._failure or error
            done.add(rank)
            self._back.release()

        done: set[int] = set()
        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        while len(done) < self.size:
            able = [rank for rank in range(self.size) if rank not in done and self._can_go_on(rank)]
            if not able:
                waits = {rank: self._waiting[rank][0] for rank in range(self.size) if rank not in done}
                self._failure = Stuck(f"no rank can go on: {waits}")
                able = list(waits)
            if self._chance is not None:
                self._chance.shuffle(able)
            for rank in able:
                self._turns[rank].release()
                self._back.acquire()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return results

    def _can_go_on(self, rank: int) -> bool:
        return self._failure is not None or rank not in self._waiting or self._waiting[rank][1]()

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        """Let other ranks run until `ready`."""
        rank = self._rank.get()
        while not ready():
            self._waiting[rank] = (what, ready)
            self._back.release()
            self._turns[rank].acquire()
            self._waiting.pop(rank, None)
            if self._failure is not None:
                raise _Ended

    def pause(self, _seconds: float) -> None:
        """Let every other rank that can take a turn."""
        looks = iter((False,))
        self.wait_for("its turn", lambda: next(looks, True))

    def _factory(self) -> GroupFactory:
        made: dict[tuple[int, ...], int] = defaultdict(int)

        def make(ranks: tuple[int, ...], rank: int) -> Group:
            made[ranks] += 1
            return VirtualGroup(ranks, rank, self, made[ranks])

        return make


class _Pending:
    def __init__(self, world: World, what: str, ready: Callable[[], bool], finish: Callable[[], None]) -> None:
        self._world, self._what, self._ready, self._finish = world, what, ready, finish
        self._done = False

    def wait(self) -> None:
        if not self._done:
            self._world.wait_for(self._what, self._ready)
            self._finish()
            self._done = True


class VirtualGroup(Group):
    """A `Group` whose members live in one `World`; `number` tells groups of the same ranks apart."""

    def __init__(self, ranks: tuple[int, ...], rank: int, world: World, number: int) -> None:
        super().__init__(ranks, rank, None)
        self.world, self._key, self._calls = world, (ranks, number), 0
        self._posted: dict[int, int] = defaultdict(int)
        self._arrived: dict[int, int] = defaultdict(int)
        self._landed: dict[tuple[int, int], Tensor] = {}

    def _meet(
        self,
        asked: tuple[Any, ...],
        tensor: Tensor,
        finish: Callable[[_Deposit], object],
        rows: Sequence[int] = (),
    ) -> Work:
        """Bring `tensor` to the group's next collective, which is complete once all have brought theirs."""
        key, self._calls = (*self._key, self._calls), self._calls + 1
        deposits = self.world.deposits
        deposit = deposits.setdefault(key, _Deposit(asked))
        if deposit.asked != asked:
            raise Stuck(
                f"rank {self.ranks[self.index]} calls {asked} where others of {self.ranks} call {deposit.asked}"
            )
        deposit.brought[self.index], deposit.rows[self.index] = tensor.detach().clone(), list(rows)

        def take() -> None:
            with torch.no_grad():
                finish(deposit)
            deposit.taken += 1
            if deposit.taken == self.size:
                del deposits[key]

        return _Pending(self.world, f"{asked} among {self.ranks}", lambda: len(deposit.brought) == self.size, take)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        if self.size == 1:
            return DONE

        def finish(deposit: _Deposit) -> None:
            total = deposit.brought[0]
            for index in range(1, self.size):
                other = deposit.brought[index]
                total = total + other if op == "sum" else torch.maximum(total, other)
            tensor.copy_(total)

        return self._meet(("all_reduce", op, tuple(tensor.shape), tensor.dtype), tensor, finish)

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        if self.size == 1:
            return super().all_gather(output, tensor)
        assert output.numel() == self.size * tensor.numel() and output.dtype == tensor.dtype

        def finish(deposit: _Deposit) -> None:
            parts = torch.cat([deposit.brought[index].reshape(-1) for index in range(self.size)])
            output.copy_(parts.view(output.shape))

        return self._meet(("all_gather", tensor.numel(), tensor.dtype), tensor, finish)

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Work:
        if self.size == 1:
            return super().reduce_scatter(output, tensor)
        assert tensor.numel() == self.size * output.numel() and output.dtype == tensor.dtype

        def finish(deposit: _Deposit) -> None:
            parts = [deposit.brought[index].reshape(self.size, -1)[self.index] for index in range(self.size)]
            output.copy_(functools.reduce(torch.add, parts).view(output.shape))

        return self._meet(("reduce_scatter", tensor.numel(), tensor.dtype), tensor, finish)

    def all_to_all(self, output: Tensor, tensor: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Work:
        if self.size == 1:
            return super().all_to_all(output, tensor, arriving, leaving)
        assert (sum(arriving), sum(leaving)) == (len(output), len(tensor)), "parts of an all-to-all do not fit"

        def finish(deposit: _Deposit) -> None:
            rows = [deposit.brought[index].split(deposit.rows[index])[self.index] for index in range(self.size)]
            assert [len(part) for part in rows] == list(arriving), f"{list(map(len, rows))} rows come, not {arriving}"
            output.copy_(torch.cat(rows))

        return self._meet(("all_to_all", tuple(tensor.shape[1:]), tensor.dtype), tensor, finish, leaving)

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        if self.size == 1:
            return DONE
        asked = ("broadcast", source, tuple(tensor.shape), tensor.dtype)
        return self._meet(asked, tensor, lambda deposit: tensor.copy_(deposit.brought[source]))

    def send(self, tensor: Tensor, to: int) -> Work:
        self.world.messages[(*self._key, self.index, to)].append(tensor.detach().clone())
        return DONE

    def receive(self, tensor: Tensor, source: int) -> Work:
        """Transfers between two ranks arrive in the order in which their receives were posted."""
        queue = self.world.messages[(*self._key, source, self.index)]
        number, self._posted[source] = self._posted[source], self._posted[source] + 1

        def ready() -> bool:
            while queue:
                self._landed[source, self._arrived[source]] = queue.popleft()
                self._arrived[source] += 1
            return (source, number) in self._landed

        def finish() -> None:
            sent = self._landed.pop((source, number))
            assert sent.shape == tensor.shape and sent.dtype == tensor.dtype, (
                f"{sent.shape} sent, {tensor.shape} wanted"
            )
            with torch.no_grad():
                tensor.copy_(sent)

        what = f"a tensor from rank {self.ranks[source]} in {self.ranks}"
        return _Pending(self.world, what, ready, finish)
