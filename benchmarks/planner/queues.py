"""How long a pipeline's plan takes where transfers queue up, as they do under the engine and NCCL.

`simulate` lets every transfer run as soon as its data are there. NCCL has one communicator for each pair of ranks and
torch runs it on one stream, both directions in turn: a transfer waits for the earlier ones of its pair, and for a
receiver that posts it later. Lowering enters both ends in one common order, so the order within a pair is known.
"""

from __future__ import annotations

from collections import defaultdict, deque

from megalite.schedule.lowering import lower
from megalite.schedule.ops import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Op,
    Plan,
    ScheduleError,
    Value,
    inputs_of,
    output_of,
    stage_owners,
)
from megalite.schedule.simulate import UNIT_COST, Cost

_Pair = tuple[int, int]


def _transfer_of(op: Op, owner: tuple[int, ...], rank: int) -> tuple[_Pair, Value]:
    """The ranks of a send or receive that `rank` lists, lower one first, and what travels between them."""
    neighbour = op.stage + (1 if op.kind in ("SF", "RB") else -1)
    sender = op.stage if op.kind in SENDS else neighbour
    other = owner[neighbour]
    return (min(rank, other), max(rank, other)), Value("F" if op.kind[1] == "F" else "G", sender, op.micro)


class _Queues:
    """The transfers of a lowered plan. `ends` has the time at which each that has run arrived."""

    def __init__(self, lowered: Plan, owner: tuple[int, ...], seconds: float) -> None:
        self.ends: dict[Value, float] = {}
        self._seconds = seconds
        self._posted: defaultdict[Value, list[float]] = defaultdict(list)
        self._free: defaultdict[_Pair, float] = defaultdict(float)
        self._waiting: defaultdict[_Pair, deque[Value]] = defaultdict(deque)
        for rank, ops in enumerate(lowered):
            for op in ops:
                if op.kind in SENDS | RECEIVES:
                    pair, value = _transfer_of(op, owner, rank)
                    if rank == pair[0]:
                        self._waiting[pair].append(value)

    def post(self, pair: _Pair, value: Value, time: float) -> None:
        """One end has come to the transfer; it and those behind it run if both ends of all before them have."""
        self._posted[value].append(time)
        queue = self._waiting[pair]
        while queue and len(self._posted[queue[0]]) == 2:
            first = queue.popleft()
            self._free[pair] = max(self._free[pair], *self._posted[first]) + self._seconds
            self.ends[first] = self._free[pair]


def queued_makespan(plan: Plan, cost: Cost = UNIT_COST, transfer: float = 0.0) -> float:
    """Time of a plan of compute operations from first start to last end; never less than `simulate`'s.

    Args:
        plan: of compute operations.
        cost: duration of each kind, a number or one for each stage.
        transfer: time of one transfer between two ranks, which runs beside their computing.

    Left out is that the engine lets no more than two gradients of a rank be on their way.
    """
    lowered, owner = lower(plan), stage_owners(plan)
    queues, made = _Queues(lowered, owner, transfer), dict[Value, float]()
    clock, position = [0.0] * len(lowered), [0] * len(lowered)

    def step(rank: int) -> bool:
        op = lowered[rank][position[rank]]
        if op.kind in COMPUTE:
            sources = [
                (value, made if owner[value.stage] == rank else queues.ends) for value in inputs_of(op, len(owner) - 1)
            ]
            if any(value not in times for value, times in sources):
                return False
            duration = cost[op.kind]
            clock[rank] = max([clock[rank], *(times[value] for value, times in sources)])
            clock[rank] += duration if isinstance(duration, float | int) else duration[op.stage]
            output = output_of(op)
            if output is not None:
                made[output] = clock[rank]
        elif op.kind in SENDS | RECEIVES:
            queues.post(*_transfer_of(op, owner, rank), clock[rank])
        position[rank] += 1
        return True

    moved = True
    while moved:
        moved = False
        for rank, ops in enumerate(lowered):
            while position[rank] < len(ops) and step(rank):
                moved = True
    stuck = [rank for rank, ops in enumerate(lowered) if position[rank] < len(ops)]
    if stuck:
        raise ScheduleError(f"transfers wait for each other on ranks {stuck}")
    return max(clock)
