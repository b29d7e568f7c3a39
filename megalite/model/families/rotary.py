"""Rotary positions in a `config.json`: their base, and how they are stretched.

transformers 4 keeps them in `rope_theta` and `rope_scaling`, transformers 5 in one table, `rope_parameters`, to which
it prefers a `rope_scaling` that stands beside it. Where two of these say different things the file is refused: each
version of transformers would compute something else.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Mapping
from typing import Any

from megalite.config import ModelConfig
from megalite.config.model import FULL, SLIDING
from megalite.config.rope_scaling import ROPE_SCALINGS
from megalite.model.families.family import Fields

_TABLES = ("rope_scaling", "rope_parameters")
_ORIGINAL = "original_max_position_embeddings"
_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_UNUSED = {"finetuned"}  # a remark of the authors of YaRN, which no implementation reads
_MAY_BE_NULL = {"yarn": {"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"}}

Rotary = tuple[float, dict[str, Any]]


def read_rotary(fields: Fields, positions: int) -> Rotary:
    """Base of the rotary frequencies, and the scaling as `ModelConfig.rope_scaling` writes it."""
    return _read_tables(fields, {name: fields.table(name) for name in _TABLES}, positions)


def read_rotary_by_type(fields: Fields, positions: int, local_theta: float, slides: bool) -> dict[str, Any]:
    """The rotary fields of `ModelConfig` where layers of sliding_attention have rotations of their own, without any
    scaling: in transformers 5 a table for each type of layer, in version 4 one of full_attention. `local_theta` is
    the base of the others where the file has no table of theirs, `slides` whether the model has such layers."""
    typed = fields.table("rope_parameters")
    if any(kind not in (FULL, SLIDING) or not isinstance(table, dict | None) for kind, table in typed.items()):
        raise fields.refusal("rope_parameters", dict(typed), f"is not made of a table for {FULL} and one for {SLIDING}")
    scaling = fields.table("rope_scaling")
    if scaling.get("rope_type") is None and scaling.get("type") is not None:
        raise fields.refusal("rope_scaling.type", scaling["type"], "is not read by transformers 5; call it rope_type")
    if scaling and fields.value("rope_parameters") is not None and not typed.get(FULL):
        raise fields.refusal("rope_parameters", dict(typed), f"lacks {FULL}, which rope_scaling beside it is of")
    tables = {"rope_scaling": scaling, f"rope_parameters.{FULL}": typed.get(FULL) or {}}
    theta, scaling = _read_tables(fields, tables, positions)
    if _ORIGINAL in scaling and not any(_ORIGINAL in table for table in tables.values()):
        raise fields.refusal("rope_type", scaling["type"], f"needs {_ORIGINAL} in the same table")
    if local := typed.get(SLIDING):
        local_theta, local_scaling = _read_table(
            fields, f"rope_parameters.{SLIDING}", local, local_theta, None, positions
        )
        if local_scaling:
            problem = f"is not supported; layers of {SLIDING} rotate without scaling"
            raise fields.refusal(f"rope_parameters.{SLIDING}", dict(local), problem)
    differs = slides and (scaling or local_theta != theta)
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local_theta if differs else 0.0}


def _read_tables(fields: Fields, tables: Mapping[str, Mapping[str, Any]], positions: int) -> Rotary:
    """What the tables that are not empty say alike, or rope_theta alone."""
    theta = fields.check_number("rope_theta", fields.value("rope_theta"), above=1)
    original = fields.count(_ORIGINAL, 1 << 40) if fields.given(_ORIGINAL) else None
    found = {name: table for name, table in tables.items() if table}
    readings = {name: _read_table(fields, name, table, theta, original, positions) for name, table in found.items()}
    if len(readings) == 2 and operator.ne(*readings.values()):
        raise fields.refusal(
            "rope_scaling",
            dict(found["rope_scaling"]),
            "contradicts rope_parameters beside it; keep one table with all keys",
        )
    rotary = next(iter(readings.values()), (theta, {}))
    if fields.given("rope_theta") and rotary[0] != theta:
        raise fields.refusal("rope_theta", theta, f"contradicts rope_theta = {rotary[0]} in {next(iter(found))}")
    return rotary


def _read_table(
    fields: Fields, table_name: str, table: Mapping[str, Any], theta: float, original: int | None, positions: int
) -> Rotary:
    kind = _kind(fields, table_name, table)
    scaling_type = ROPE_SCALINGS.get(kind)
    needed = set() if scaling_type is None else set(scaling_type.needed)
    optional = set() if scaling_type is None else set(scaling_type.optional)
    for key, value in table.items():
        if isinstance(value, dict):
            raise fields.refusal(table_name, table, "is not supported; megalite computes one table for all layers")
        if key not in _COMMON | _UNUSED | needed | optional and value is not None:
            raise fields.refusal(f"{table_name}.{key}", value, f"has no meaning for rope_type = {kind!r}; remove it")
    if table.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise fields.refusal("partial_rotary_factor", table["partial_rotary_factor"], "is not supported; 1.0 is")
    theta = fields.check_number(f"{table_name}.rope_theta", table.get("rope_theta", theta), above=1)
    if kind == "default":
        return theta, {}
    scaling = {key: table[key] for key in sorted(needed | optional) if key in table}
    if _ORIGINAL in needed:
        scaling[_ORIGINAL] = _original(fields, scaling.get(_ORIGINAL), original, positions)
    if kind == "yarn" and "factor" in scaling and scaling["factor"] is None:
        scaling["factor"] = positions / scaling[_ORIGINAL]
    scaling = {
        key: value for key, value in scaling.items() if value is not None or key not in _MAY_BE_NULL.get(kind, ())
    }
    _check(fields, table_name, kind, needed, scaling)
    return theta, {"type": kind, **scaling}


def _kind(fields: Fields, table_name: str, table: Mapping[str, Any]) -> str:
    named = {
        table[key] if isinstance(table[key], str) else repr(table[key]) for key in ("rope_type", "type") if key in table
    }
    if len(named) > 1:
        other = reprlib.repr(table["rope_type"])
        raise fields.refusal(f"{table_name}.type", table["type"], f"contradicts rope_type = {other}")
    kind = next(iter(named), "default")
    if kind != "default" and kind not in ROPE_SCALINGS:
        raise fields.refusal("rope_type", kind, f"is not supported; known are default, {', '.join(ROPE_SCALINGS)}")
    return kind


def _original(fields: Fields, inside: Any, outside: int | None, positions: int) -> Any:
    """The original length: transformers 5 looks beside the table first; without any, it is that of the model."""
    if outside is not None and inside is not None and inside != outside:
        other = reprlib.repr(inside)
        raise fields.refusal(_ORIGINAL, outside, f"contradicts {_ORIGINAL} = {other} in the rotary table")
    return next(value for value in (inside, outside, positions) if value is not None)


def _check(fields: Fields, table_name: str, kind: str, needed: set[str], scaling: Mapping[str, Any]) -> None:
    if missing := sorted(needed - scaling.keys()):
        raise fields.refusal(table_name, dict(scaling), f"lacks {', '.join(missing)}")
    for key, value in scaling.items():
        if key == "truncate":
            if type(value) is not bool:
                raise fields.refusal(f"{table_name}.truncate", value, "is neither true nor false")
        else:
            fields.check_number(f"{table_name}.{key}", value)
    if scaling["factor"] < 1:
        raise fields.refusal(f"{table_name}.factor", scaling["factor"], "is below 1")
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    defaults = {"beta_slow": 1, "beta_fast": 32}
    if kind != "linear" and scaling.get(low, defaults.get(low)) >= scaling.get(high, defaults.get(high)):
        raise fields.refusal(f"{table_name}.{low}", scaling.get(low), f"is not below {high}")


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """The fields of transformers 4, which version 5 reads as well."""
    scaling = {key: value for key, value in model.rope_scaling.items() if key != "type"}
    kind = model.rope_scaling.get("type", "default")
    return {
        "rope_theta": float(model.rope_theta) if math.isfinite(model.rope_theta) else None,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
    }
