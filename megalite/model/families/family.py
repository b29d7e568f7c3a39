"""A family of Hugging Face models: reading and writing its `config.json` and its tensors.

A family is one file: what its fields mean and default to, which fields change nothing, and which tensors its files
hold. Nothing outside this package asks which family a model is of. A field that nobody reads and a value that megalite
does not compute are refused by name, so that a model is either what transformers computes or not read at all.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config import ModelConfig
from megalite.config.bounds import shown
from megalite.config.model import TRAINING_ONLY
from megalite.errors import UserError

STACK = ".experts.gate_up_proj"
"""How the names of stacked experts end."""


@dataclass(frozen=True)
class Rows:
    """Rows [first, first + count) of a global tensor; the rows of a vector are its elements."""

    name: str
    shape: tuple[int, ...]
    first: int
    count: int


@dataclass(frozen=True)
class FileTensor:
    """A tensor as a family's files hold it: `parts` of global tensors, one after the other.

    Its rows are those of the matrix that results when all dimensions but the last are flattened, so that fused
    projections, one tensor an expert and stacked experts are all written as parts.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Rows, ...]
    fp32: bool = False
    """Written in fp32 whatever the dtype of the others."""

    def placed_parts(self) -> Iterator[tuple[int, Rows]]:
        """Each part with its first row in the file tensor."""
        starts = itertools.accumulate((part.count for part in self.parts), initial=0)
        return zip(starts, self.parts)


def whole(name: str, *shape: int, stored_as: str = "", fp32: bool = False) -> FileTensor:
    """A global tensor that the files hold whole, under the same name or another."""
    return FileTensor(stored_as or name, shape, (Rows(name, shape, 0, shape[0]),), fp32)


class Fields:
    """A `config.json` read field by field: absent fields take the family's defaults, and what was read is noted.

    Every method raises a `UserError` that begins with `where` and names the field and its value.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._config, self._defaults = config, defaults
        self._read: set[str] = set()

    def refusal(self, name: str, value: object, problem: str) -> UserError:
        return UserError(f"{self.where}: {shown(name)} = {reprlib.repr(value)} {problem}")

    def given(self, name: str) -> bool:
        return name in self._config

    def value(self, name: str) -> Any:
        """The field as it is, or the family's default."""
        self._read.add(name)
        return self._config[name] if name in self._config else self._defaults.get(name)

    def count(self, name: str, most: int, *, least: int = 1, null: int | None = None) -> int:
        """A whole number from `least` to `most`; `null`, where given, is what a null field means."""
        value = self.value(name)
        if value is None and null is not None:
            return null
        if type(value) is not int or not least <= value <= most:
            raise self.refusal(name, value, f"is not a whole number from {least} to {most}")
        return value

    def number(self, name: str) -> float:
        return self.check_number(name, self.value(name))

    def check_number(self, name: str, value: Any, *, above: float = 0) -> float:
        """`value` if it is a plain, finite number greater than `above`."""
        if type(value) not in (int, float) or not above < value < 1e30:  # NaN fails both comparisons
            raise self.refusal(name, value, f"is not a number above {above}")
        return float(value)

    def layers(self, name: str, most: int) -> tuple[int, ...]:
        """A list of layer numbers below `most`, ascending; empty for null."""
        value = self.value(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(each) is int and 0 <= each < most for each in value):
            raise self.refusal(name, value, f"is not a list of layer numbers from 0 to {most - 1}")
        return tuple(sorted(set(value)))

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if type(value) is not bool:
            raise self.refusal(name, value, "is neither true nor false")
        return value

    def table(self, name: str) -> Mapping[str, Any]:
        """An object; empty for null."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(name, value, "is not a table")
        return value or {}

    def refuse_rest(self, fixed: Mapping[str, tuple[Any, ...]], without_effect: Mapping[str, str]) -> None:
        """Refuse what was not read, unless it has the one value that megalite computes, or no effect, or is null."""
        for name, value in self._config.items():
            if name in self._read or name in without_effect or value is None:
                continue
            if name not in fixed:
                named = name if name.isidentifier() else reprlib.repr(name)
                raise self.refusal(
                    named, value, "is not a field that megalite knows; remove it if it does not change the model"
                )
            if value not in fixed[name]:
                raise self.refusal(name, value, f"is not supported; megalite computes {fixed[name][0]!r} only")


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    `architectures` are the names that its directories may give, the one that is written first. `defaults` are those of
    its configuration class in transformers; `fixed` are fields of which megalite computes certain values only, and
    `without_effect` those that change no result, with the reason. `read` and `write` translate the rest; `tensors`
    lists what the architecture consists of, and `copies` which further tensors may lie in the files if they equal
    another one. Names that match `ignored` are left out. Files may instead hold the experts of a layer in stacks, as
    transformers has them in memory: `stacked_tensors` lists those.
    """

    model_type: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    without_effect: Mapping[str, str]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    tensors: Callable[[ModelConfig], Iterator[FileTensor]]
    copies: Callable[[ModelConfig], Mapping[str, str]]
    ignored: re.Pattern[str]
    stacked_tensors: Callable[[ModelConfig], Iterator[FileTensor]] | None = None

    def tensors_in(self, model: ModelConfig, names: Iterable[str]) -> Iterator[FileTensor]:
        """`tensors` or `stacked_tensors`, whichever files with these tensors are meant to hold."""
        if self.stacked_tensors is not None and any(name.endswith(STACK) for name in names):
            return self.stacked_tensors(model)
        return self.tensors(model)

    def read_config(self, config: Mapping[str, Any], where: str) -> ModelConfig:
        """The model that a `config.json` of this family describes; raises UserError."""
        fields = Fields(config, self.defaults, where)
        if fields.value("model_type") != self.model_type:
            raise fields.refusal("model_type", config.get("model_type"), f"is not {self.model_type!r}")
        self._check_architectures(fields)
        if (quantised := fields.value("quantization_config")) is not None:
            problem = "means quantised weights, which are not read; save the model in bf16 and remove the field"
            raise fields.refusal("quantization_config", quantised, problem)
        model = self.read(fields)
        fields.refuse_rest(self.fixed, self.without_effect)
        return model

    def _check_architectures(self, fields: Fields) -> None:
        named = fields.value("architectures")
        listed = named if isinstance(named, list) else [named]
        if named is not None and not all(name in self.architectures for name in listed):
            known = " or ".join(self.architectures)
            raise fields.refusal("architectures", named, f"does not fit model_type = {self.model_type!r}, use {known}")

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """`config.json` of a model, without dtype and special tokens. Whether it is that model, `unlike` says."""
        return {"architectures": [self.architectures[0]], "model_type": self.model_type, **self.write(model)}

    def unlike(self, model: ModelConfig) -> str:
        """What keeps this family from being the model: fields that do not survive the way through its `config.json`.

        Empty where the family computes just this model. A new field of `ModelConfig` is covered without being named;
        those that only say how it is trained do not count.
        """
        try:
            again = self.read_config(self.write_config(model), self.architectures[0])
        except UserError as error:
            return str(error)
        lost = [
            f"model.{name} = {reprlib.repr(value)}"
            for name, value in vars(model).items()
            if value != getattr(again, name) and name not in TRAINING_ONLY
        ]
        return f"{self.architectures[0]} has no {' and no '.join(lost)}" if lost else ""
