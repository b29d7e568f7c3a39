"""Families of Hugging Face models: what a `config.json` means and which tensors the model consists of.

Every module in this package that has a `Family` is one; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.model.families.family import Family, FileTensor, Rows
from megalite.model.families.llama import LLAMA

__all__ = ["FAMILIES", "Family", "FileTensor", "Rows", "families_in", "family_of_config", "family_of_model"]


def families_in(folders: Sequence[str]) -> tuple[Family, ...]:
    """The families that the modules in these folders of the package define: Llama, then the others by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(folders)]
    found = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Family)}
    return tuple(sorted(found.values(), key=lambda family: (family is not LLAMA, family.model_type)))


FAMILIES = families_in(__path__)


def family_of_config(config: Mapping[str, Any], where: str) -> Family:
    """The family that a `config.json` names; raises UserError."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{where}: model_type = {reprlib.repr(kind)} is not supported; known are {known}")


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
