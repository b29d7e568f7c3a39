"""Names in a configuration that stand for code: built-in ones, or a user's own as `module:name`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from megalite.errors import UserError

Thing = TypeVar("Thing")


def search_beside(recipe: Path | str) -> None:
    """Let modules that lie in the recipe's folder be found, after everything else that can be imported."""
    folder = str(Path(recipe).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def look_up(name: str, known: Mapping[str, Thing], field: str) -> Thing:
    """What `name` stands for in `known`, or the attribute of a module where it is written `module:name`.

    `field` is the configuration field that holds the name, for the message of the `UserError`.
    """
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{field} = {name!r} is unknown; use {', '.join(known)} or module:name of your own{hint}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"{field} = {name!r}: {error}; put the module beside the recipe or on PYTHONPATH") from None
    except AttributeError:
        raise UserError(f"{field} = {name!r}: the module {module} has no {attribute}") from None
