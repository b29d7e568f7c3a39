"""The types of `model.rope_scaling` and their keys, for the checks and the help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megalite.config.bounds import Above, AtLeast, Range, quoted, shown

_FACTOR, _TURNS, _LENGTH, _MAGNITUDE = AtLeast(1, 1e6), Above(0, 1e6), AtLeast(1, 2**31 - 1), Above(0, 1e6)


@dataclass(frozen=True)
class Scaling:
    """The keys of one type besides `type`; a key without bounds is true or false."""

    needed: Mapping[str, Range]
    optional: Mapping[str, Range | None]


ROPE_SCALINGS: Mapping[str, Scaling] = MappingProxyType(
    {
        "linear": Scaling({"factor": _FACTOR}, {}),
        "llama3": Scaling(
            {
                "factor": _FACTOR,
                "low_freq_factor": _TURNS,
                "high_freq_factor": _TURNS,
                "original_max_position_embeddings": _LENGTH,
            },
            {},
        ),
        "yarn": Scaling(
            {"factor": _FACTOR, "original_max_position_embeddings": _LENGTH},
            {
                "beta_fast": _TURNS,
                "beta_slow": _TURNS,
                "attention_factor": _MAGNITUDE,
                "mscale": _MAGNITUDE,
                "mscale_all_dim": _MAGNITUDE,
                "truncate": None,
            },
        ),
    }
)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN sharpens attention over `factor` times the length (Peng et al. 2023, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_rope_scaling(table: Mapping[str, Any], path: str = "model.rope_scaling") -> str:
    """What is wrong with a table, in a sentence that names the key; empty for a right one, and for an empty table."""
    if not table:
        return ""
    kind = table.get("type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        return f"{path}.type = {quoted(kind)} is unknown; known are {', '.join(ROPE_SCALINGS)}"
    scaling = ROPE_SCALINGS[kind]
    if lacking := [key for key in scaling.needed if key not in table]:
        return f"{path} = {shown(dict(table))} lacks {', '.join(lacking)}; {kind} needs it"
    known = {**scaling.needed, **scaling.optional}
    if foreign := [key for key in table if key not in known and key != "type"]:
        return f"{path} has unknown {shown(', '.join(foreign))}; {kind} has {', '.join(known)}"
    for key, bound in known.items():
        if key in table and (message := _refuse_value(table[key], bound, f"{path}.{key}")):
            return message
    if kind == "llama3" and table["low_freq_factor"] >= table["high_freq_factor"]:
        low, high = table["low_freq_factor"], table["high_freq_factor"]
        return f"{path}.low_freq_factor = {low} is not below high_freq_factor = {high}; swap them"
    return ""


def _refuse_value(value: Any, bound: Range | None, path: str) -> str:
    if bound is None:
        return "" if isinstance(value, bool) else f"{path} = {quoted(value)} is not true or false"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{path} = {quoted(value)} is not a number"
    return bound.refusal(value, path)


@dataclass(frozen=True)
class RopeScaling:
    """The bound of the field `model.rope_scaling`."""

    def refusal(self, value: Mapping[str, Any], path: str) -> str:
        """What is wrong with the table."""
        return check_rope_scaling(value, path)

    def __str__(self) -> str:
        types = []
        for kind, scaling in ROPE_SCALINGS.items():
            optional = f"; {', '.join(scaling.optional)}" if scaling.optional else ""
            types.append(f"`{kind}` {{{', '.join(scaling.needed)}{optional}}}")
        return f"empty, or a table with `type` = {' or '.join(types)}"
