"""Simulate a plan without a model: its duration, its bubble, its peak activations, and that it cannot deadlock.

Both walks advance each rank only when what it waits for has happened (ready queues, no rescans), so they take time
proportional to the number of operations: plans for thousands of GPUs are checked in a second.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from megalite.schedule.ops import (
    COMPUTE,
    Op,
    Plan,
    ScheduleError,
    Value,
    compute_ops,
    counterpart,
    inputs_of,
    output_of,
    stage_owners,
)

Cost = Mapping[str, float | Sequence[float]]
"""Duration of each compute kind: one number, or one per stage (uneven stages). Any unit."""

UNIT_COST: Cost = MappingProxyType({"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0})
"""Backward has two GEMMs for each one in forward."""


class Event(NamedTuple):
    """A compute operation in time, in the units of the cost."""

    op: Op
    rank: int
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What a plan costs.

    Attributes:
        makespan: time from the first start to the last end.
        bubble: fraction of the ranks' time spent idle, 0 to 1.
        peak_live: for each rank, the most (stage, micro-batch) activations that it holds at once.
        timeline: for each rank, its compute operations in order of time.
    """

    makespan: float
    bubble: float
    peak_live: tuple[int, ...]
    timeline: tuple[tuple[Event, ...], ...]


class DeadlockError(ScheduleError):
    """A lowered plan deadlocks; `stopped` maps every stuck rank to the operation it waits at."""

    def __init__(self, message: str, stopped: Mapping[int, Op]) -> None:
        super().__init__(message)
        self.stopped = stopped


def simulate(plan: Plan, cost: Cost = UNIT_COST, transfer: float = 0.0) -> Simulation:
    """Time a plan: each rank runs its list in order, every operation as soon as its inputs exist.

    Args:
        plan: compute operations; communication operations are ignored.
        cost: duration of each kind, a number or one for each stage.
        transfer: time that an activation or gradient takes to the next rank; transfers overlap with compute.
    """
    timeline: list[list[Event]] = [[] for _ in plan]
    for event in completions(plan, cost, transfer):
        timeline[event.rank].append(event)
    makespan = max(events[-1].end for events in timeline if events)
    busy = sum(event.end - event.start for events in timeline for event in events)
    return Simulation(
        makespan=makespan,
        bubble=1.0 - busy / (makespan * len(plan)),
        peak_live=tuple(_peak_live(ops) for ops in plan),
        timeline=tuple(map(tuple, timeline)),
    )


def _peak_live(ops: Sequence[Op]) -> int:
    """Activations are held from a stage's forward to the end of its backward, which is W where B is split."""
    live = peak = 0
    for op in ops:
        live += {"F": 1, "B": -1, "W": -1}.get(op.kind, 0)
        peak = max(peak, live)
    return peak


def completions(
    plan: Plan, cost: Cost = UNIT_COST, transfer: float = 0.0, pauses: Mapping[Op, float] = MappingProxyType({})
) -> Iterator[Event]:
    """The compute operations of a plan in order of completion (lower rank first in a tie).

    `pauses` are times for which a rank stands still after an operation, whose result is already on its way.

    Raises ScheduleError if the plan gets stuck because an input is never produced, or only later on the same rank.
    """
    plan = compute_ops(plan)
    owner = stage_owners(plan)
    last_stage = len(owner) - 1
    made: dict[Value, float] = {}
    waiting: defaultdict[Value, list[int]] = defaultdict(list)
    position = [0] * len(plan)
    clock = [0.0] * len(plan)
    running: list[tuple[float, int, float]] = []  # (end, rank, start)

    def start_next(rank: int) -> None:
        if position[rank] == len(plan[rank]):
            return
        op = plan[rank][position[rank]]
        start = clock[rank]
        for value in inputs_of(op, last_stage):
            if value not in made:
                waiting[value].append(rank)
                return
            start = max(start, made[value] + (transfer if owner[value.stage] != rank else 0.0))
        duration = cost[op.kind]
        heapq.heappush(
            running, (start + (duration if isinstance(duration, float | int) else duration[op.stage]), rank, start)
        )

    for rank in range(len(plan)):
        start_next(rank)
    while running:
        end, rank, start = heapq.heappop(running)
        op = plan[rank][position[rank]]
        position[rank] += 1
        clock[rank] = end + pauses.get(op, 0.0)
        yield Event(op, rank, start, end)
        value = output_of(op)
        if value is not None:
            if value in made:
                raise ScheduleError(f"rank {rank} runs {op} twice")
            made[value] = end
            for waiter in waiting.pop(value, ()):
                start_next(waiter)
        start_next(rank)
    if waiting:
        stops = (f"rank {rank} waits at {plan[rank][position[rank]]}" for ranks in waiting.values() for rank in ranks)
        raise ScheduleError(f"the schedule cannot go on: {', '.join(sorted(stops))}")


def check_deadlock(lowered: Plan) -> None:
    """Prove that a lowered plan completes even with fully blocking communication.

    Every send blocks until the matching receive is the other rank's very next operation, and T until both ranks reach
    it. A plan that passes cannot hang with any amount of buffering or overlap. R is among data-parallel replicas, which
    run the same list and so meet in the same order: it never blocks a plan.

    Raises DeadlockError if ranks stop, and ScheduleError if a rank uses what it has not yet made or received.
    """
    owner = stage_owners(lowered)
    last_stage = len(owner) - 1
    position = [0] * len(lowered)
    held: list[set[Value]] = [set() for _ in lowered]
    ready = list(range(len(lowered)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(lowered[rank]):
            op = lowered[rank][position[rank]]
            if op.kind not in COMPUTE and op.kind != "R":
                other, match = _meeting(op, owner)
                if other != rank:
                    if position[other] == len(lowered[other]) or lowered[other][position[other]] != match:
                        break
                    _step(other, match, last_stage, held)
                    position[other] += 1
                    ready.append(other)
            _step(rank, op, last_stage, held)
            position[rank] += 1
    stopped = {rank: ops[at] for rank, (ops, at) in enumerate(zip(lowered, position, strict=True)) if at < len(ops)}
    if stopped:
        raise DeadlockError(_describe_stop(stopped, owner), stopped)


def _step(rank: int, op: Op, last_stage: int, held: list[set[Value]]) -> None:
    """Run `op` on `rank`: check that the rank holds its inputs, and add its outputs to what the rank holds."""
    if op.kind in COMPUTE:
        needs, makes = tuple(inputs_of(op, last_stage)), output_of(op)
    elif op.kind in ("SF", "SB"):
        needs, makes = (Value("F" if op.kind == "SF" else "G", op.stage, op.micro),), None
    elif op.kind in ("RF", "RB"):
        needs, makes = (), Value("F", op.stage - 1, op.micro) if op.kind == "RF" else Value("G", op.stage + 1, op.micro)
    else:
        return
    for value in needs:
        if value not in held[rank]:
            what = "activation" if value.kind == "F" else "gradient"
            raise ScheduleError(
                f"rank {rank} runs {op} before it has the {what} of stage {value.stage}, micro-batch {value.micro}"
            )
    if makes is not None:
        held[rank].add(makes)


def _meeting(op: Op, owner: tuple[int, ...]) -> tuple[int, Op]:
    """The rank, and its operation, that a blocking operation waits for."""
    match = counterpart(op, len(owner) - 1)
    if not 0 <= match.stage < len(owner):
        raise ScheduleError(f"{op} has no other end: the stages are 0 to {len(owner) - 1}")
    return owner[match.stage], match


def _describe_stop(stopped: Mapping[int, Op], owner: tuple[int, ...]) -> str:
    """Follow the wait-for chain until it cycles or ends at a finished rank; describe only that part."""
    chain: list[int] = []
    rank = min(stopped)
    while rank in stopped and rank not in chain:
        chain.append(rank)
        rank = _meeting(stopped[rank], owner)[0]
    if rank in chain:
        chain = chain[chain.index(rank) :]
    waits = []
    for rank in chain:
        other, match = _meeting(stopped[rank], owner)
        at = f"is at {stopped[other]}" if other in stopped else "has finished"
        waits.append(f"rank {rank} at {stopped[rank]} waits for {match} of rank {other}, which {at}")
    return f"deadlock: {'; '.join(waits)}"
