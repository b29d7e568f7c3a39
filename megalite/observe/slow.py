"""The rule for slow ranks, shared by the warning during a run and the report afterwards."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

SLOW = 1.25
"""A rank is slow if its own work takes more than this multiple of its peers' median."""


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
    """Compare every rank that did any work with its peers.

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
