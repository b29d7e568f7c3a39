"""What `gpu_session.sh` puts in the place of the package tomli_w where a bare machine lacks it: enough for a recipe."""

import json
from collections.abc import Mapping
from typing import Any


def dumps(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of plain values as TOML."""
    return "\n".join(
        line for name, table in tables.items() for line in (f"[{name}]", *map(_line, table, table.values()), "")
    )


def _line(name: str, value: Any) -> str:
    return f"{name} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(_line, value, value.values())) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)  # TOML writes strings, numbers and booleans as JSON does
