"""A training job that is over in a moment: random tokens, and a recipe for a model of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.indexed import IndexedWriter

MODEL = {"layers": 2, "hidden_size": 24, "heads": 2, "vocab_size": 50, "max_positions": 64}
"""The recipe's model section. Both heads and the vocabulary can be cut in two, the layers into two stages."""


def write_tokens(prefix: Path, tokens: int = 3000, vocabulary: int = MODEL["vocab_size"], **provenance: Any) -> None:
    """A token file of one document, random anew every time; `provenance` is told in its JSON file."""
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.random.default_rng().integers(vocabulary, size=tokens))
        writer.finish(provenance)


def write_recipe(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """Write `tokens.bin/.idx` and `recipe.toml` into `folder`; a run of the recipe leaves its files in `folder/run`.

    Args:
        sections: fields that are added to those of the recipe's section of that name, or replace them.

    Returns:
        The path of the recipe.
    """
    write_tokens(folder / "tokens")
    recipe: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "model": MODEL,
        "data": {"train": [str(folder / "tokens")]},
        "train": {"steps": 6, "seq_length": 16, "global_batch_size": 4, "precision": "fp32"},
        "log": {"tensorboard": False},
    }
    for section, fields in sections.items():
        recipe[section] = recipe.get(section, {}) | dict(fields)
    import tomli_w  # here, for GPU machines that collect the tests without it

    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path
