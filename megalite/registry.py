"""Names in a configuration that stand for code: built-in ones, or a user's own as `module:name`.

A built-in name is a line in `BUILT_IN`; the module that it stands for is imported when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalite.errors import UserError

BUILT_IN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "model.block": {
            "pre_norm": "megalite.model.block:Block",
            "reordered_norm": "megalite.model.post_norm:ReorderedNormBlock",
            "sandwich_norm": "megalite.model.post_norm:SandwichNormBlock",
        },
        "model.attention": {
            "gqa": "megalite.model.attention:GroupedQueryAttention",
            "mla": "megalite.model.latent_attention:LatentAttention",
        },
        "model.feed_forward": {
            "swiglu": "megalite.model.feed_forward:SwiGLU",
            "geglu": "megalite.model.feed_forward:GeGLU",
        },
        "objective.kind": {
            "next_token": "megalite.objective.next_token:NextToken",
            "sft": "megalite.objective.next_token:NextToken",
            "reward": "megalite.objective.preference:BradleyTerry",
            "dpo": "megalite.objective.preference:DPO",
            "ppo": "megalite.objective.policy:ClippedPolicy",
            "grpo": "megalite.objective.policy:ClippedPolicy",
        },
        "optimizer.kind": {"adamw": "megalite.optim.adamw:AdamW", "muon": "megalite.optim.muon:Muon"},
        "adapter.kind": {
            "lora": "megalite.model.lora:LoRA",
            "rslora": "megalite.model.lora:RankStabilisedLoRA",
        },
    }
)
"""By configuration field: what its names stand for. docs/extending.md says what each must be."""


def search_beside(recipe: Path | str) -> None:
    """Make modules in the recipe's folder importable, after everything else on the path."""
    folder = str(Path(recipe).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def import_beside(recipe: Path | str, name: str) -> None:
    """Import the module of `module:name` from the recipe's folder, if it is there, before any other of that name."""
    module = name.partition(":")[0]
    file = Path(recipe).resolve().parent.joinpath(*module.split(".")).with_suffix(".py")
    if module in sys.modules or not file.is_file():
        return
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None
    sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        del sys.modules[module]
        raise UserError(f"{file} cannot be imported ({type(error).__name__}: {error}); mend it") from error


def look_up(field: str, name: str) -> Any:
    """What `name`, the value of a configuration field in `BUILT_IN`, stands for. Raises `UserError`."""
    known = BUILT_IN[field]
    return load(known.get(name, name), field, known)


def load(name: str, field: str, known: Iterable[str] = ()) -> Any:
    """The attribute of a module that is written `module:name`.

    `field` holds the name and `known` are its built-in names, for the message of the `UserError`.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        known = tuple(known)
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{field} = {name!r} is unknown; use {', '.join((*known, 'module:name of your own'))}{hint}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"{field} = {name!r}: {error}; put the module beside the recipe or on PYTHONPATH") from None
    except AttributeError:
        raise UserError(f"{field} = {name!r}: the module {module} has no {attribute}") from None
