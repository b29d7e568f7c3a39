"""The token files of a recipe: entries of `data.train` and `data.valid`, read in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalite.config.bounds import Above, quoted, shown, text_problem
from megalite.errors import UserError

MOST_SOURCES = 32767
"""A blend stores the number of a sample's source in 16 bits, as Megatron-LM does."""

WEIGHT = Above(0, 1e12)
_FORMS = 'its entries are prefixes "a" or weights and prefixes [0.7, "a"]'


@dataclass(frozen=True)
class Source:
    """Token files `prefix`.bin and .idx, and their share; weight 0: in proportion to their size."""

    prefix: str
    weight: float = 0.0


def parse_sources(value: Any, field: str = "data.train") -> tuple[Source, ...]:
    """Read prefixes, or pairs of weight and prefix; a single prefix may stand without a list.

    Raises:
        UserError: naming `field`, for another form, a weight that is not a number above 0, or prefixes of which only
            some have a weight.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        raise UserError(f'{field} = {quoted(value)} is not a list of prefixes, as ["a", "b"]')
    if len(entries) > MOST_SOURCES:
        raise UserError(
            f"{field} names {len(entries):,} token files; at most {MOST_SOURCES:,} can be mixed: merge some"
        )
    sources = tuple(_source(entry, field) for entry in entries)
    if len({source.weight > 0 for source in sources}) > 1:
        raise UserError(
            f"{field} = {shown(value)} mixes weighted and plain prefixes; give all of them weights, or none"
        )
    return sources


def plain_sources(sources: Sequence[Source]) -> tuple[Any, ...]:
    """The same as a recipe writes it: prefixes, or pairs of weight and prefix."""
    return tuple((source.weight, source.prefix) if source.weight else source.prefix for source in sources)


def _source(entry: Any, field: str) -> Source:
    weight: Any = None
    prefix = entry
    if isinstance(entry, list | tuple) and len(entry) == 2:
        weight, prefix = entry
    if not isinstance(prefix, str):
        raise UserError(f"{field} has {quoted(entry)}; {_FORMS}")
    if not prefix or (problem := text_problem(prefix)):
        raise UserError(f"{field} has {quoted(prefix)}, which {problem if prefix else 'is empty'}; name token files")
    if weight is None:
        return Source(prefix)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight if isinstance(weight, float) else 0.0):
        raise UserError(f"{field}, weight of {quoted(prefix)}, = {quoted(weight)} is not a number")
    if message := WEIGHT.refusal(weight, f"{field}, weight of {quoted(prefix)},"):
        raise UserError(message)
    return Source(prefix, float(weight))


@dataclass(frozen=True)
class Sources:
    """The bound of the fields that name token files."""

    def refusal(self, value: Any, path: str) -> str:
        """What is wrong with the entries."""
        try:
            parse_sources(value, path)
        except UserError as error:
            return str(error)
        return ""

    def __str__(self) -> str:
        return "prefixes, or pairs of weight and prefix"
