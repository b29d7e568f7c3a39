"""Families of Hugging Face models, each one file: what its `config.json` means and which tensors it consists of."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.model.families.family import Family, FileTensor, Rows
from megalite.model.families.llama import LLAMA
from megalite.model.families.mistral import MISTRAL
from megalite.model.families.qwen2 import QWEN2
from megalite.model.families.qwen3 import QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)

__all__ = ["FAMILIES", "Family", "FileTensor", "Rows", "family_of_config", "family_of_model"]


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """The family that a `config.json` names; raises UserError."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{where}: model_type = {reprlib.repr(kind)} is not supported; known are {known} (dense models)")


def family_of_model(model: ModelConfig, preferred: str = "") -> Family:
    """The family that computes just this model: `preferred`, the `model_type` it was imported as, if that still does,
    else the first that does. Raises a UserError that says what each family lacks."""
    problems = []
    for family in sorted(FAMILIES, key=lambda family: family.model_type != preferred):
        problem = family.unlike(model)
        if not problem:
            return family
        problems.append(problem)
    raise UserError(f"no architecture of transformers that megalite knows is this model: {'; '.join(problems)}")
