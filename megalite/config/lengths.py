"""Lengths of sequences that the ranks of an axis can share."""

from __future__ import annotations

import math


def sequence_unit(ranks: int, split: int = 1) -> int:
    """What a sequence's length is a multiple of where `ranks` share it: each has two equal pieces that together divide
    by `split`."""
    return ranks * math.lcm(2, split) if ranks > 1 else 1


def padded_length(length: int, ranks: int, split: int = 1) -> int:
    """`length`, or the next one that `ranks` can share."""
    unit = sequence_unit(ranks, split)
    return -(-length // unit) * unit
