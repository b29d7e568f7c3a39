"""Conversion between Hugging Face's `config.json` and megalite's `ModelConfig`.

Reads the layouts of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`,
`layer_types`); writes the former, which both versions read. The families (`megalite.model.families`) interpret the
fields.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

import torch

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.model.families import family_of_config, family_of_model

DTYPE_FIELDS = ("torch_dtype", "dtype")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def model_config_from_huggingface(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a Hugging Face `config.json` describes. Raises UserError that begins with `where`."""
    declared_dtype(config, where)
    return family_of_config(config, where).read_config(config, where)


def declared_dtype(config: Mapping[str, Any], where: str) -> torch.dtype | None:
    """The weights' dtype in a `config.json`, if given; its two fields must agree. Raises UserError."""
    words = {field: config[field] for field in DTYPE_FIELDS if config.get(field) is not None}
    known = {name: dtype for dtype, name in NAMES.items()}
    for field, word in words.items():
        if not isinstance(word, str) or word not in known:
            raise UserError(f"{where}: {field} = {reprlib.repr(word)} is not supported; known are {', '.join(known)}")
    if len(set(words.values())) > 1:
        raise UserError(f"{where}: torch_dtype = {words['torch_dtype']!r} contradicts dtype = {words['dtype']!r}")
    return known[next(iter(words.values()))] if words else None


def eos_ids(config: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """The end-of-text ids in a `config.json` or `generation_config.json`; None if not given.

    Raises UserError for anything but an id or a list of ids.
    """
    value = config.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(number) is int and -1 <= number < 1 << 31 for number in ids):
        raise UserError(f"{where}: eos_token_id = {reprlib.repr(value)} is not a token id or a list of them")
    return tuple(number for number in ids if number >= 0)


def huggingface_config(
    model: ModelConfig, dtype: str, kept: Mapping[str, Any] | None = None, preferred: str = ""
) -> dict[str, Any]:
    """`config.json` of a model; `dtype` is `float32`, `bfloat16` or `float16`.

    `preferred` is the `model_type` to use if that family can express this model; fields of `kept` that do not affect
    results are copied. Raises UserError for a combination of features that no family has.
    """
    family = family_of_model(model, preferred)
    carried = {name: value for name, value in (kept or {}).items() if name in family.without_effect}
    carried = {name: value for name, value in carried.items() if name not in DTYPE_FIELDS}
    return dict(sorted((family.write_config(model) | carried | {DTYPE_FIELDS[0]: dtype}).items()))
