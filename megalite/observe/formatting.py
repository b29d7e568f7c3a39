"""Formatting of numbers and paths in messages."""

from __future__ import annotations

from pathlib import Path


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `1,000 ranks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def times(number: int) -> str:
    """`once`, `twice`, `3 times`."""
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")


def short_path(path: Path | str) -> str:
    """The last two parts of a path: enough to find it, short enough for a terminal."""
    parts = Path(path).parts
    return str(path) if len(parts) <= 2 else "/".join(("…", *parts[-2:]))
