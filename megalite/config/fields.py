"""What the sections of the configuration are made of: kinds of counts, and fields that follow from others."""

from __future__ import annotations

from typing import Annotated, Any

from megalite.config.bounds import AtLeast

DERIVED: Any = None
"""Default of a field that `__post_init__` computes from others."""

Count = Annotated[int, AtLeast(1, 2**31 - 1)]
CountOrNone = Annotated[int, AtLeast(0, 2**31 - 1)]
"""A number of things, and one where 0 means none; up to what 32-bit indices hold."""


def derive(section: object, **values: object) -> None:
    """Give the still undefined fields of a frozen section their values."""
    for name, value in values.items():
        if getattr(section, name) is DERIVED:
            object.__setattr__(section, name, value)
