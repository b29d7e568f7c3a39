"""Lowering: from a schedule's compute operations to a rank's full list of operations, including communication."""

from collections import Counter
from collections.abc import Iterator, Sequence

from megalite.schedule.ops import NO_MICRO, Op, Plan, counterpart, stage_owners
from megalite.schedule.simulate import completions

_SEND_AFTER = {"F": "SF", "B": "SB", "I": "SB"}


def lower(plan: Plan, *, tied: bool = False) -> Plan:
    """Add the transfers between ranks, and the collectives T and R, to a plan of compute operations.

    The plan is simulated in time, and each event is appended at once to the lists of all ranks involved: a send with
    its receive, T on both its ranks. All lists are therefore projections of one total order, which is why the result
    cannot deadlock even if every transfer blocks both ends: the earliest pending event is always next on every rank it
    needs. A receive is placed before the operation that the receiver is running when the data become ready, so an
    engine that posts receives without waiting overlaps the transfer with that operation, and allocates no buffer
    several operations early.

    Args:
        plan: compute operations; every stage on one rank. A forward-only plan gets no collectives.
        tied: the first and the last stage share the embedding. Adds T after the last backward of both: on each of the
            two ranks, or once as 0T if one rank holds both stages and the sum is local.

    Returns:
        The plan with SF/RF after each F and SB/RB after each B or I whose neighbour is on another rank, and R of each
        stage after its last backward (after T for the first and last stage of a tied model).

    Raises:
        ScheduleError: the plan cannot complete, or is not a schedule.
    """
    owner = stage_owners(plan)
    last_stage = len(owner) - 1
    ends = {0, last_stage} if tied else set()
    backwards_left = Counter(op.stage for ops in plan for op in ops if op.kind in ("B", "W"))
    lowered: list[list[Op]] = [[] for _ in plan]
    for op, rank, _, _ in completions(plan):
        for place, listed in with_transfers(op, owner):
            lowered[place].append(listed)
        if op.kind not in ("B", "W"):
            continue
        backwards_left[op.stage] -= 1
        if backwards_left[op.stage]:
            continue
        if op.stage not in ends:
            lowered[rank].append(Op("R", op.stage, NO_MICRO))
        elif not any(backwards_left[stage] for stage in ends):
            for meeting in {owner[stage]: stage for stage in sorted(ends, reverse=True)}.values():
                lowered[owner[meeting]].append(Op("T", meeting, NO_MICRO))
            for stage in sorted(ends):
                lowered[owner[stage]].append(Op("R", stage, NO_MICRO))
    return tuple(map(tuple, lowered))


def with_transfers(op: Op, owner: Sequence[int]) -> Iterator[tuple[int, Op]]:
    """A compute operation and, where its result goes to another rank, the send and the receive; each with its rank.

    `owner` is the rank of each stage. Appended at once to the ranks' lists, they keep one total order (see `lower`).
    """
    rank, last_stage = owner[op.stage], len(owner) - 1
    yield rank, op
    if op.kind in _SEND_AFTER:
        send = Op(_SEND_AFTER[op.kind], op.stage, op.micro)
        receive = counterpart(send, last_stage)
        if 0 <= receive.stage <= last_stage and owner[receive.stage] != rank:
            yield rank, send
            yield owner[receive.stage], receive
