"""NCCL's rules, played through for what `tests.support.recording` has written down of every rank of a job.

- The operations of a communicator run one after the other in the order in which a rank has enqueued them.
- One begins when it is at the head of its queue on all ranks that take part in it, and on each of them the computation
  has come to the place where it was started. Nothing is matched by content: what meets at the heads is taken to belong
  together.
- A wait stops the rank's computation until the operation is over.

Transfers between two ranks have a communicator of their own where it is made at the first transfer (torch's default),
and share that of their group where all were made at the start.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from megalite.schedule.ops import RECEIVES, SENDS, counterpart
from tests.support.recording import HostWait, Product, Start, Wait

Program = Sequence[Start | Wait | HostWait | Product]
"""What one rank does, in order."""


class Hang(AssertionError):
    """The job would stand still, or mix messages up."""


def play(programs: Sequence[Program], last_stage: int, *, one_communicator: bool) -> None:
    """Run all ranks to their ends; raise Hang where NCCL would not get there."""
    at = [0] * len(programs)
    over: set[Start] = set()
    queues: defaultdict[tuple[int, tuple[int, ...]], deque[Start]] = defaultdict(deque)
    ready = deque(range(len(programs)))
    while ready:
        rank = ready.popleft()
        program, fresh = programs[rank], set()
        while at[rank] < len(program):
            event = program[at[rank]]
            if isinstance(event, Wait) and event.start not in over:
                break
            if isinstance(event, Start):
                communicator = event.group if one_communicator else event.ranks
                queues[rank, communicator].append(event)
                fresh.add(communicator)
            at[rank] += 1
        for communicator in fresh:
            ready.extend(_meet(queues, communicator, over, last_stage))
    stuck = [f"rank {rank} at {programs[rank][place]}" for rank, place in enumerate(at) if place < len(programs[rank])]
    left = [f"rank {rank}: {queue[0]}" for (rank, _), queue in queues.items() if queue]
    if stuck or left:
        raise Hang("; ".join(["deadlock", *stuck, *left]))


def _meet(queues: dict, communicator: tuple[int, ...], over: set[Start], last_stage: int) -> set[int]:
    """Complete what has come to the heads of a communicator's queues; the ranks that took part."""
    moved: set[int] = set()
    while True:
        for rank in communicator:
            queue = queues[rank, communicator]
            if queue and all(
                (head := queues[other, communicator]) and head[0].ranks == queue[0].ranks for other in queue[0].ranks
            ):
                members = queue[0].ranks
                break
        else:
            return moved
        heads = [queues[member, communicator].popleft() for member in members]
        for head in heads[1:]:
            _belong_together(heads[0], head, last_stage)
        if heads[0].name == "all_to_all":
            _parts_fit(heads)
        over.update(heads)
        moved.update(members)


def _belong_together(one: Start, other: Start, last_stage: int) -> None:
    transfer = {one.name, other.name} == {"send", "receive"}
    fits = transfer or (one.name == other.name and one.name not in ("send", "receive"))
    fits = fits and one.dtype == other.dtype
    fits = fits and (one.elements == other.elements or one.name == "all_to_all")  # whose parts are checked on their own
    if one.during is not None and other.during is not None:
        if one.during.kind in SENDS | RECEIVES:
            fits = fits and counterpart(one.during, last_stage) == other.during
        else:
            fits = fits and one.during.kind == other.during.kind
    if not fits:
        raise Hang(f"{one} meets {other}")


def _parts_fit(heads: Sequence[Start]) -> None:
    """Of an all-to-all: each gets from every other what that one sends."""
    for at, one in enumerate(heads):
        for other_at, other in enumerate(heads):
            if one.parts[0][other_at] != other.parts[1][at]:
                raise Hang(f"{one} meets {other}: {one.parts[0]} rows arrive, {other.parts[1]} leave")
