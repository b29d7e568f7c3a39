"""On PYTHONPATH, this hides what a GPU machine with torch, triton and pytest alone does not have."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ABSENT = frozenset(
    ("tomli_w", "tyro", "docstring_parser", "typeguard", "shtab", "orjson", "zstandard", "hypothesis", "transformers",
     "tensorboard", "wandb", "xxhash", "jinja2", "fastwarc", "resiliparse", "xdist", "pytest_timeout")
)  # fmt: skip

_find_spec = PathFinder.find_spec


def _hidden(
    cls: type[PathFinder], name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
) -> ModuleSpec | None:
    brought = name == "tomli_w" and any("stand_ins" in folder for folder in sys.path)
    return None if name.partition(".")[0] in ABSENT and not brought else _find_spec(name, path, target)


PathFinder.find_spec = classmethod(_hidden)  # type: ignore[method-assign,assignment]
