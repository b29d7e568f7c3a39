"""Names in a configuration that refer to code: built-in ones, or a user's own as `module:name`."""

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
    """Make modules in the recipe's folder importable, after everything else on the path."""
    folder = str(Path(recipe).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def look_up(name: str, known: Mapping[str, Thing], field: str) -> Thing:
    """The object called `name` in `known`, or a module's attribute if written as `module:name`.

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
