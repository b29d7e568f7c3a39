"""Pipeline schedules: pure functions `(ranks, micro_batches, chunks) -> Plan`, compute operations only, order only.

With `chunks` > 1 a rank holds that many stages (virtual stages). Stage s is on rank s % ranks, or, for a V-shaped
schedule (`v`), down the ranks and up again. Every schedule runs the backward of each stage in micro-batch order, so
accumulated gradients are bitwise those of one process. docs/schedules.md explains how to add a schedule.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from megalite.errors import UserError
from megalite.registry import load
from megalite.schedule.ops import Op, Plan, Value, inputs_of, output_of


def gpipe(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv:1811.06965).

    The bubble is (p-1)/(m+p-1), and every rank holds the activations of all m micro-batches.
    """
    _expect_chunks("gpipe", chunks, chunks == 1)
    return tuple(
        tuple(Op(kind, rank, micro) for kind in ("F", "B") for micro in range(micro_batches)) for rank in range(ranks)
    )


def one_f_one_b(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """One forward, one backward in turn once the pipeline is full (Narayanan et al., arXiv:2006.09503, section 3).

    The bubble is GPipe's, but rank r holds the activations of only min(p - r, m) micro-batches.
    """
    _expect_chunks("1f1b", chunks, chunks == 1)
    return tuple(
        _warm_steady_cool(
            warm=min(ranks - 1 - rank, micro_batches),
            forwards=[Op("F", rank, micro) for micro in range(micro_batches)],
            backwards=[Op("B", rank, micro) for micro in range(micro_batches)],
        )
        for rank in range(ranks)
    )


def interleaved(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """1F1B with v stages on each rank (Narayanan et al., arXiv:2104.04473, section 2.2).

    Micro-batches go in groups of p through one chunk of layers after the other. The bubble falls to (p-1)/(v*m+p-1) at
    the price of v times the transfers. Needs micro_batches % ranks == 0.
    """
    _expect_chunks("interleaved", chunks, chunks >= 2)
    if micro_batches % ranks:
        raise ValueError(f"interleaved: micro_batches = {micro_batches} is not a multiple of ranks = {ranks}")

    way = _grouped(ranks, micro_batches, chunks)

    def operations(rank: int) -> tuple[Op, ...]:
        forwards = [Op("F", chunk * ranks + rank, micro) for chunk, micro in way]
        backwards = [Op("B", (chunks - 1 - chunk) * ranks + rank, micro) for chunk, micro in way]
        warm = min((chunks - 1) * ranks + 2 * (ranks - 1 - rank), len(way))
        return _warm_steady_cool(warm, forwards, backwards)

    return tuple(operations(rank) for rank in range(ranks))


def zb_h1(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """1F1B with split backward: weight gradients fill the bubble (Qi et al., arXiv:2401.10241, section 2.1).

    Rank r delays weight gradients by r micro-batches, so every rank holds at most p activations. With equal F, I and W
    the bubble is (p-1)/(3m+p-1), a third of 1F1B's.
    """
    _expect_chunks("zb_h1", chunks, chunks == 1)

    def operations(rank: int) -> Iterator[Op]:
        warm = min(ranks - 1 - rank, micro_batches)
        yield from (Op("F", rank, micro) for micro in range(warm))
        for micro in range(micro_batches):
            if warm + micro < micro_batches:
                yield Op("F", rank, warm + micro)
            yield Op("I", rank, micro)
            if micro >= rank:
                yield Op("W", rank, micro - rank)
        yield from (Op("W", rank, micro) for micro in range(max(0, micro_batches - rank), micro_batches))

    return tuple(tuple(operations(rank)) for rank in range(ranks))


_V_PREFERENCE = (("F", 1), ("F", 0), ("I", 0), ("I", 1), ("W", 1), ("W", 0))
"""The operations a rank of `zb_v` prefers: (kind, chunk). Of all orders this one has the smallest bubble."""


def zb_v(ranks: int, micro_batches: int, chunks: int = 2) -> Plan:
    """Two stages per rank in a V, down the ranks and up again, split backward (Qi et al., arXiv:2405.15362).

    The loss is on rank 0, where the first gradient is needed soonest. Built greedily in unit time steps: at each, every
    rank takes the first of `_V_PREFERENCE` whose inputs exist. A rank holds at most 2p activations of half-size stages,
    as much as 1F1B. With equal F, I and W the bubble is (p-1)/(6m+p-1) for m = p and from m = 1.5 p on, and up to 1.8
    times that in between.
    """
    _expect_chunks("zb_v", chunks, chunks == 2)
    last = 2 * ranks - 1
    plan: list[list[Op]] = [[] for _ in range(ranks)]
    following: Counter[tuple[str, int]] = Counter()
    made: set[Value] = set()
    live = [0] * ranks

    def choose(rank: int) -> Op | None:
        for kind, chunk in _V_PREFERENCE:
            stage = last - rank if chunk else rank
            op = Op(kind, stage, following[kind, stage])
            fits = op.micro < micro_batches and (kind != "F" or live[rank] < 2 * ranks)
            if fits and made.issuperset(inputs_of(op, last)):
                return op
        return None

    # All ranks choose before any result of this step is entered, so an output can be used from the next step on. The
    # limit in `choose` bounds memory: F takes an activation, W frees one, so a full rank fills its idle steps with I
    # and W instead of running further ahead.
    while sum(map(len, plan)) < 6 * ranks * micro_batches:
        for rank, op in enumerate([choose(rank) for rank in range(ranks)]):
            if op is not None:
                plan[rank].append(op)
                following[op.kind, op.stage] += 1
                live[rank] += {"F": 1, "I": 0, "W": -1}[op.kind]
                made.update(value for value in (output_of(op),) if value is not None)
    return tuple(map(tuple, plan))


def forward_only(owners: Sequence[int], micro_batches: int) -> Plan:
    """Forwards only, for validation and scoring: any number of micro-batches, any placement of the stages.

    Args:
        owners: the rank that holds each stage, equally many on each (see `place_stages`).
        micro_batches: at least 1.
    """
    ranks = max(owners) + 1
    way = _grouped(ranks, micro_batches, len(owners) // ranks)
    held = [[stage for stage, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
    return tuple(tuple(Op("F", held[rank][chunk], micro) for chunk, micro in way) for rank in range(ranks))


def in_pairs(plan: Plan) -> Plan:
    """A plan of one rank and one stage, with two forwards in a row and then what followed each of them.

    Two forwards that take turns hide each other's collectives (`megalite.parallel.turns`). One micro-batch more is in
    flight.
    """
    (operations,) = plan
    forwards = [op for op in operations if op.kind == "F"]
    early = dict(zip(forwards[::2], forwards[1::2]))
    paired: list[Op] = []
    for op in operations:
        if op not in early.values():
            paired += [op, early[op]] if op in early else [op]
    return (tuple(paired),)


def _grouped(ranks: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in a rank's order: groups of `ranks` micro-batches go through all chunks.

    When a group's last micro-batch leaves the rank, its first one returns from the other ranks for the next chunk.
    """
    return [
        (chunk, micro)
        for group in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for micro in range(group, min(group + ranks, micro_batches))
    ]


def _warm_steady_cool(warm: int, forwards: list[Op], backwards: list[Op]) -> tuple[Op, ...]:
    """`warm` forwards, then alternating forwards and backwards, then the remaining backwards."""
    steady = [op for pair in zip(forwards[warm:], backwards, strict=False) for op in pair]
    return tuple(forwards[:warm] + steady + backwards[len(forwards) - warm :])


def _expect_chunks(name: str, chunks: int, right: bool) -> None:
    if not right:
        raise ValueError(f"{name} cannot place {chunks} chunks on a rank")


class Refusal(NamedTuple):
    """Why a schedule cannot be built: the field that is wrong, the problem (before the schedule's name), a remedy."""

    field: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Schedule:
    """A schedule and its constraints on the configuration."""

    build: Callable[[int, int, int], Plan]
    summary: str
    interleaves: bool = False
    """Needs at least 2 stages per rank and a multiple of `ranks` micro-batches. Otherwise exactly `chunks` per rank."""
    chunks: int = 1
    v: bool = False
    """V-shaped placement: the second half of the stages goes back up the ranks."""

    @property
    def least_chunks(self) -> int:
        """The minimum number of stages per rank."""
        return 2 if self.interleaves else self.chunks

    def micro_batches_multiple(self, ranks: int) -> int:
        """The number that must divide the number of micro-batches."""
        return ranks if self.interleaves else 1

    def refusal(self, ranks: int, micro_batches: int, chunks: int) -> Refusal | None:
        """Why `build_schedule` refuses these arguments; None if it does not."""
        if ranks < 1:
            return Refusal("parallel.pipeline", "is too small for", "it must be at least 1")
        if chunks < self.least_chunks or (chunks > self.chunks and not self.interleaves):
            if self.interleaves:
                remedy = 'set parallel.virtual_stages = 2 or more, or parallel.schedule = "1f1b"'
                return Refusal("parallel.virtual_stages", "is too small for", remedy)
            remedy = f'set parallel.virtual_stages = {self.chunks}, or parallel.schedule = "interleaved"'
            return Refusal("parallel.virtual_stages", "does not fit", remedy)
        if micro_batches < 1:
            remedy = "make it at least train.micro_batch_size x the data-parallel size"
            return Refusal("train.global_batch_size", "too few for", remedy)
        if micro_batches % self.micro_batches_multiple(ranks):
            below = micro_batches // ranks * ranks
            choices = f"{below} or {below + ranks}" if below else f"{ranks}"
            problem = f"not divisible by parallel.pipeline = {ranks}, as needed for"
            remedy = f'choose it so that there are {choices}, or set parallel.schedule = "1f1b"'
            return Refusal("train.global_batch_size", problem, remedy)
        return None


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "gpipe": Schedule(gpipe, "all forwards, then all backwards"),
        "1f1b": Schedule(one_f_one_b, "one forward, one backward; activations of at most p micro-batches"),
        "interleaved": Schedule(interleaved, "1f1b with several stages on each rank; smaller bubble", interleaves=True),
        "zb_h1": Schedule(zb_h1, "1f1b with backward in two parts; a third of its bubble at its memory"),
        "zb_v": Schedule(zb_v, "two stages on each rank, down and up again; a sixth of its bubble", chunks=2, v=True),
    }
)
"""Every schedule by its name in `parallel.schedule`."""


def find_schedule(name: str) -> Schedule:
    """The schedule that `parallel.schedule` names: a built-in one, or a `Schedule` of one's own as `module:NAME`."""
    return SCHEDULES[name] if name in SCHEDULES else load(name, "parallel.schedule", SCHEDULES)


def place_stages(name: str, ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """The pipeline rank that holds each stage of the schedule `name`; arguments as in `build_schedule`."""
    stages = range(ranks * chunks)
    if find_schedule(name).v:
        return tuple(min(stage, len(stages) - 1 - stage) for stage in stages)
    return tuple(stage % ranks for stage in stages)


def build_schedule(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """The plan of schedule `name`, or a UserError that names the field to change.

    Args:
        name: `parallel.schedule`.
        ranks: `parallel.pipeline`.
        micro_batches: per step and data-parallel replica: global_batch_size / (micro_batch_size * data-parallel size).
        chunks: `parallel.virtual_stages`, the number of stages on each rank.
    """
    schedule = find_schedule(name)
    if refusal := schedule.refusal(ranks, micro_batches, chunks):
        given = {
            "parallel.pipeline": f"= {ranks}",
            "parallel.virtual_stages": f"= {chunks}",
            "train.global_batch_size": f"gives {micro_batches} micro-batches a step to each data-parallel replica,",
        }[refusal.field]
        raise UserError(f'{refusal.field} {given} {refusal.problem} the schedule "{name}"; {refusal.remedy}')
    return schedule.build(ranks, micro_batches, chunks)
