"""What `data.train` and `data.valid` name: token files with their shares, read and checked in this one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from megalite.config.bounds import quoted, text_problem
from megalite.errors import UserError

MAX_SOURCES = 32766
"""Token files of one blend: it numbers them in int16, as Megatron-LM does."""


RECORD_FILES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of files of records, each also with .gz or .zst, beside the prefixes of token files."""


def is_record_file(name: str) -> bool:
    """Whether an entry is a file of records (examples for alignment), not the prefix of a token file."""
    return name.lower().removesuffix(".gz").removesuffix(".zst").endswith(RECORD_FILES)


@dataclass(frozen=True)
class Source:
    """A token file: the prefix of its `.bin` and `.idx`, and its weight; None mixes in proportion to the sizes."""

    prefix: str
    weight: float | None = None


def parse_sources(entries: Sequence[Any], field: str) -> tuple[Source, ...]:
    """Read prefixes, or pairs of a weight and a prefix; sources that were read already are taken as they are.

    Raises:
        UserError: `field` mixes both forms, has another entry, a weight that is not a positive number, or weights of
            which the shares cannot be computed.
    """
    if not isinstance(entries, list | tuple):
        raise UserError(f'{field} = {quoted(entries)} is not a list of prefixes, as ["a", "b"]')
    if len(entries) > MAX_SOURCES:
        raise UserError(f"{field}: {len(entries)} files; at most {MAX_SOURCES} can be blended: merge some")
    sources = tuple(_source(entry, field) for entry in entries)
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        raise UserError(f"{field} mixes weighted and plain prefixes; give all of them weights, or none")
    for source in sources:
        if source.weight is not None and not 0 < source.weight < math.inf:
            remedy = "leave the file out" if source.weight == 0 else "give each file its share, as 0.7 and 0.3"
            raise UserError(f"{field}: weight {source.weight} of {source.prefix} is not a positive number; {remedy}")
    if weights and (math.isinf(sum(weights)) or min(weights) / sum(weights) == 0):
        raise UserError(
            f"{field}: weights from {min(weights)} to {max(weights)} have no shares in floating point;"
            " give each file its share, as 0.7 and 0.3"
        )
    return sources


def _source(entry: Any, field: str) -> Source:
    if isinstance(entry, Source):
        return entry
    weight, prefix = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, entry)
    numeric = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not isinstance(prefix, str | PathLike) or not (weight is None or numeric):
        raise UserError(f'{field} has {quoted(entry)}; its entries are prefixes "a" or weights and prefixes [0.7, "a"]')
    if problem := text_problem(str(prefix)) or ("" if str(prefix) else "is empty"):
        raise UserError(f"{field} has {quoted(str(prefix))}, which {problem}; give the prefix of a .bin and .idx")
    try:
        return Source(str(prefix), None if weight is None else float(weight))
    except OverflowError:
        raise UserError(f"{field}: weight {quoted(weight)} is too large; give each file its share") from None


def plain_sources(sources: Sequence[Source]) -> tuple[Any, ...]:
    """The same as a recipe writes it: prefixes, or pairs of weight and prefix."""
    return tuple(source.prefix if source.weight is None else (source.weight, source.prefix) for source in sources)


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
