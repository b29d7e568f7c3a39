"""Bounds on a field's value, declared with the field as `Annotated[int, AtLeast(1)]`.

A bound refuses a value in one sentence (`refusal`) and is, as a string, what would be right, for `--help`.
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, get_origin

from megalite.cli import printable

_SHOWN = 120


class Bound(Protocol):
    """A rule for values of the right type; `str()` of it completes "it must be ..."."""

    def refusal(self, value: Any, path: str) -> str:
        """What is wrong with the value of field `path`, and what would be right; empty if nothing is wrong."""
        ...


@dataclass(frozen=True)
class Range:
    """Numbers in an interval with inclusive or exclusive ends."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def refusal(self, value: float, path: str) -> str:
        """Which end the value passes."""
        problem = ""
        if value < self.low or (self.above and value == self.low):
            problem = "is too small"
        elif value > self.high or (self.below and value == self.high):
            problem = "is too large"
        elif value != value:
            problem = "is not a number"
        return f"{path} = {shown(value)} {problem}; it must be {self}" if problem else ""

    def __str__(self) -> str:
        ends = [f"{'above' if self.above else 'at least'} {self.low:.12g}"]
        if self.high < math.inf:
            ends.append(f"{'below' if self.below else 'at most'} {self.high:.12g}")
        return " and ".join(ends)


@dataclass(frozen=True)
class Named:
    """Built-in names, or code of one's own as `module:name` (see `megalite.registry`)."""

    names: tuple[str, ...]

    def refusal(self, value: str, path: str) -> str:
        """What is wrong with the name."""
        module, colon, attribute = value.partition(":")
        own = colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if own or value in self.names:
            return ""
        near = difflib.get_close_matches(value.lower(), self.names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{path} = {quoted(value)} is unknown; it must be {self}{hint}"

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}, or module:name of your own"


def AtLeast(low: float, high: float = math.inf, *, below: bool = False) -> Range:
    """Numbers from `low` up to `high`, with `high` itself unless `below`."""
    return Range(low, high, below=below)


def Above(low: float, high: float = math.inf) -> Range:
    """Numbers above `low`, up to `high`."""
    return Range(low, high, above=True)


def split_annotation(annotation: Any) -> tuple[Any, tuple[Bound, ...]]:
    """The plain type and the bounds of a schema annotation."""
    if get_origin(annotation) is Annotated:
        plain, *bounds = get_args(annotation)
        return plain, tuple(bounds)
    return annotation, ()


def refusal(value: Any, annotation: Any, path: str) -> str:
    """The message for a value of the right type that its bounds refuse; empty if they do not."""
    plain, bounds = split_annotation(annotation)
    for bound in bounds:
        if message := bound.refusal(value, path):
            return message
    if get_origin(plain) is tuple:
        for index, item in enumerate(value):
            if message := refusal(item, get_args(plain)[0], f"{path}[{index}]"):
                return message
    return ""


def text_problem(text: str) -> str:
    """What keeps a text from being a name or a path: empty, or "has ..."."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            return f"has the character {character!a}"
    return f"has {len(text):,} characters" if len(text) > 4096 else ""


def shown(value: Any) -> str:
    """Any value for a message: as in TOML, truncated if long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        value = list(value)
    try:
        text = str(value) if isinstance(value, str | int | float) else repr(value)
    except (ValueError, RecursionError):  # more digits than Python prints, or lists in lists without end
        return "a value that is too large to show"
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def quoted(value: Any) -> str:
    """The same with a text in quotes."""
    return repr(value) if isinstance(value, str) and len(value) <= _SHOWN else shown(value)
