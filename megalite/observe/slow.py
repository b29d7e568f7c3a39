"""Which rank is slow: the one rule, for the warning of a run under way and for the report on one that is over."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

SLOW = 1.25
"""A rank whose own work takes this many times the median of its peers is slow."""


@dataclass(frozen=True)
class Comparison:
    """A rank's own work, in seconds a step, beside the median of its peers: the ranks of its pipeline stage.

    A rank that is alone in its stage is compared with all ranks; it is not `certain` then, as its stage may simply have
    more to do.
    """

    rank: int
    stage: int
    seconds: float
    usual: float
    certain: bool

    @property
    def ratio(self) -> float:
        return self.seconds / max(self.usual, 1e-9)

    @property
    def slow(self) -> bool:
        return self.ratio > SLOW


def compare_ranks(seconds: Mapping[int, float], stages: Mapping[int, int]) -> list[Comparison]:
    """Every rank that did any work beside its peers.

    Args:
        seconds: own work by rank.
        stages: the pipeline stage of each of them.
    """
    working = {rank: value for rank, value in seconds.items() if value > 0}
    members: dict[int, list[float]] = defaultdict(list)
    for rank, value in working.items():
        members[stages[rank]].append(value)
    found = []
    for rank, value in working.items():
        certain = len(members[stages[rank]]) > 1 or len(members) == 1
        peers = members[stages[rank]] if certain else list(working.values())
        found.append(Comparison(rank, stages[rank], value, statistics.median_low(peers), certain))
    return found
