"""1F1B with a longer warm-up, so that a transfer has a whole step in which to arrive (Zhuang et al. 2023,
arXiv:2211.05322, "eager 1F1B"). A rank keeps about twice the activations of 1F1B.

    [parallel]
    schedule = "eager_1f1b:EAGER"
"""

from __future__ import annotations

from megalite.schedule.ops import Op, Plan
from megalite.schedule.schedules import Schedule


def eager_1f1b(ranks: int, micro_batches: int, chunks: int = 1) -> Plan:
    """Rank r begins with 2 (p - 1 - r) forwards instead of p - 1 - r; then one forward, one backward in turn."""

    def operations(rank: int) -> tuple[Op, ...]:
        warm = min(2 * (ranks - 1 - rank), micro_batches)
        order = [Op("F", rank, micro) for micro in range(warm)]
        for micro in range(micro_batches):
            if warm + micro < micro_batches:
                order.append(Op("F", rank, warm + micro))
            order.append(Op("B", rank, micro))
        return tuple(order)

    return tuple(operations(rank) for rank in range(ranks))


EAGER = Schedule(eager_1f1b, "1f1b with a longer warm-up; transfers have twice the time")
