"""Pipeline schedules: pure functions `(ranks, micro_batches, chunks) -> Plan`, compute operations only, order only.

Stage s lives on rank s % ranks; with `chunks` > 1 a rank holds that many stages (virtual stages), which are not
neighbours. Every schedule runs the backward of each stage in micro-batch order, so the gradients it accumulates are
bitwise those of one process. docs/schedules.md tells how to add a schedule.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megalite.errors import UserError
from megalite.parallel.pipeline.ops import Op, Plan


def gpipe(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv:1811.06965).

    Simple; idle share (p-1)/(m+p-1), and every rank keeps the activations of all m micro-batches.
    """
    _expect_chunks("gpipe", chunks, chunks == 1)
    return tuple(
        tuple(Op(kind, rank, micro) for kind in ("F", "B") for micro in range(micro_batches)) for rank in range(ranks)
    )


def one_f_one_b(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """One forward, one backward in turn once the pipeline is full (Narayanan et al., arXiv:2006.09503, section 3).

    The idle share is GPipe's; rank r keeps the activations of min(p - r, m) micro-batches only.
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

    Micro-batches travel in groups of p through one chunk of layers after the other. The idle share falls to
    (p-1)/(v*m+p-1) at the price of v times the transfers. Needs micro_batches % ranks == 0.
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


def forward_only(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """Forwards alone, for validation and scoring: any number of micro-batches and chunks."""
    way = _grouped(ranks, micro_batches, chunks)
    return tuple(tuple(Op("F", chunk * ranks + rank, micro) for chunk, micro in way) for rank in range(ranks))


def _grouped(ranks: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order in which a rank meets them: `ranks` micro-batches at a time through all chunks.

    When a group's last micro-batch has left the rank, its first comes back from the other ranks for the next chunk.
    """
    return [
        (chunk, micro)
        for group in range(0, micro_batches, ranks)
        for chunk in range(chunks)
        for micro in range(group, min(group + ranks, micro_batches))
    ]


def _warm_steady_cool(warm: int, forwards: list[Op], backwards: list[Op]) -> tuple[Op, ...]:
    """`warm` forwards, then a forward and a backward in turn until the forwards are out, then the other backwards."""
    steady = [op for pair in zip(forwards[warm:], backwards, strict=False) for op in pair]
    return tuple(forwards[:warm] + steady + backwards[len(forwards) - warm :])


def _expect_chunks(name: str, chunks: int, right: bool) -> None:
    if not right:
        raise ValueError(f"{name} cannot place {chunks} chunks on a rank")


@dataclass(frozen=True)
class Schedule:
    """A schedule and what it asks of the configuration."""

    build: Callable[[int, int, int], Plan]
    summary: str
    interleaves: bool = False
    """True: at least 2 stages on each rank, micro-batches a multiple of the ranks. False: one stage on each rank."""


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "gpipe": Schedule(gpipe, "all forwards, then all backwards"),
        "1f1b": Schedule(one_f_one_b, "one forward, one backward; activations of at most p micro-batches"),
        "interleaved": Schedule(interleaved, "1f1b with several stages on each rank; smaller bubble", interleaves=True),
    }
)
"""Every schedule by the name that `parallel.schedule` calls it."""


def build_schedule(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """The plan of schedule `name`, or a UserError that names the field to change.

    Args:
        name: `parallel.schedule`.
        ranks: `parallel.pipeline`.
        micro_batches: per step and data-parallel replica: global_batch_size / (micro_batch_size * data-parallel size).
        chunks: `parallel.virtual_stages`, the number of stages on each rank.
    """
    schedule = SCHEDULES.get(name)
    if schedule is None:
        near = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.5)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise UserError(f'parallel.schedule = "{name}" is unknown: use one of {", ".join(SCHEDULES)}{hint}')
    if ranks < 1:
        raise UserError(f"parallel.pipeline = {ranks}: a pipeline needs at least 1 rank")
    if micro_batches < 1:
        raise UserError(
            f"train.global_batch_size gives {micro_batches} micro-batches a step to each data-parallel replica: "
            "make it at least train.micro_batch_size x the data-parallel size"
        )
    if schedule.interleaves:
        _require_interleavable(name, ranks, micro_batches, chunks)
    elif chunks != 1:
        raise UserError(
            f'parallel.virtual_stages = {chunks}: the schedule "{name}" puts one stage on each rank; set '
            'parallel.virtual_stages = 1, or parallel.schedule = "interleaved"'
        )
    return schedule.build(ranks, micro_batches, chunks)


def _require_interleavable(name: str, ranks: int, micro_batches: int, chunks: int) -> None:
    if chunks < 2:
        raise UserError(
            f'parallel.virtual_stages = {chunks}: the schedule "{name}" needs at least 2 stages on each rank; set '
            'parallel.virtual_stages = 2 or more, or parallel.schedule = "1f1b"'
        )
    if micro_batches % ranks:
        below = micro_batches // ranks * ranks
        choices = f"{below} or {below + ranks}" if below else f"{ranks}"
        raise UserError(
            f"train.global_batch_size gives {micro_batches} micro-batches a step to each data-parallel replica, but "
            f'the schedule "{name}" needs a multiple of parallel.pipeline = {ranks}: choose it so that there are '
            f'{choices}, or set parallel.schedule = "1f1b"'
        )
