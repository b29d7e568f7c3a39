"""From recipes and command lines to a `Config`, and back to TOML.

Values of a recipe and values of `--section.field value` take the same way: a plain TOML value is fitted to the type
that the schema declares, or refused with the field, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from megalite.cli import Parser, nonempty
from megalite.config.bounds import quoted, refusal, shown, split_annotation, text_problem
from megalite.config.schema import Config
from megalite.config.sources import parse_sources, plain_sources
from megalite.errors import UserError
from megalite.registry import search_beside

Tables = dict[str, dict[str, Any]]

_SECTIONS: dict[str, type] = get_type_hints(Config)
_FIELDS: dict[str, dict[str, Any]] = {
    name: get_type_hints(section, include_extras=True) for name, section in _SECTIONS.items()
}

MOST_RECIPE_BYTES = 1 << 18
"""Longest recipe that is read; the shipped ones have less than 2 KiB."""


class CommandLine(NamedTuple):
    """What `python -m megalite.train` was asked for."""

    config: Config
    check_only: bool
    recipe: str | None = None


def parse_command_line(
    argv: Sequence[str], program: str = "python -m megalite.train", taken: Sequence[str] = ()
) -> CommandLine:
    """Read `[RECIPE.toml] [--check] [--section.field value ...]`; `--help` prints every field and leaves.

    `taken` are options that the program has read already: the nearest of a mistyped one may be among them.
    """
    if "--help" in argv or "-h" in argv:
        from megalite.config.help import print_help

        print_help(program)
        raise SystemExit(0)
    parser = Parser(None, prog=program, overrides=parse_overrides)
    parser.add_argument("recipe", nargs="?", type=nonempty)
    parser.add_argument("--check", action="store_true")
    for option in taken:
        parser.add_argument(option)
    options = parser.parse_args(argv)
    return CommandLine(load_config(options.recipe, options.overrides), options.check, options.recipe)


def load_config(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe (None: the defaults) with `--section.field value` overrides laid over it."""
    tables = read_recipe(recipe) if recipe is not None else {}
    if recipe is not None:
        search_beside(recipe)
    for (section, name), value in parse_overrides(overrides).items():
        tables.setdefault(section, {})[name] = value
    return build_config(tables)


def read_recipe(path: str | Path) -> Tables:
    """The tables of a TOML file, unchecked but for their form."""
    try:
        tables = parse_toml(_read_regular_file(path).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"recipe {path} does not exist; give the path of a TOML file, see launch/recipes") from None
    except OSError as error:
        raise UserError(f"recipe {shown(str(path))} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"recipe {shown(str(path))} is not valid TOML: {shown(str(error))}") from None
    for section, table in tables.items():
        _known(section, _SECTIONS, f"section [{section[:80]}] of {path}", "")
        if not isinstance(table, dict):
            raise UserError(
                f"{section} = {quoted(table)} in {path} stands outside a section; write it under [{section}]"
            )
    return tables


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; whatever is wrong with it is a ValueError of one line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("lists or tables lie too deep in each other") from None
    except ValueError:  # the only one that tomllib lets through
        raise ValueError("a number has too many digits") from None


def _read_regular_file(path: str | Path) -> bytes:
    """A file of a recipe's size; pipes and devices, which may never end, are refused unopened."""
    if "\0" in str(path):
        raise ValueError("the path has the character '\\x00'")
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(None, "it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "it is not a regular file")
    if status.st_size > MOST_RECIPE_BYTES:
        raise OSError(None, f"it has {status.st_size:,} bytes, more than {MOST_RECIPE_BYTES:,}")
    with open(path, "rb") as file:
        return file.read(MOST_RECIPE_BYTES + 1)


def parse_overrides(arguments: Sequence[str]) -> dict[tuple[str, str], Any]:
    """`--section.field value` or `--section.field=value`, any number of times; the last of a field counts."""
    values: dict[tuple[str, str], Any] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, text = option.removeprefix("--").partition("=")
        section, dot, name = key.replace("-", "_").partition(".")
        if not option.startswith("--") or not dot:
            raise UserError(f"{quoted(option)} is not understood; overrides are written --section.field value")
        expected = _field_type(section, name, option.partition("=")[0])
        if not equals:
            if not rest or (rest[0].startswith("--") and "." in rest[0]):
                raise UserError(f"{option} has no value; write {option} followed by {describe(expected)}")
            text = rest.pop(0)
        values[section, name] = _from_text(text, expected)
    return values


def build_config(tables: Mapping[str, Mapping[str, Any]]) -> Config:
    """Fit plain values to the schema's types; unknown sections and fields are refused with the nearest known one."""
    sections = {}
    for section, table in tables.items():
        _known(section, _SECTIONS, f"section [{section}]", "")
        fields = {}
        for name, value in table.items():
            expected = _field_type(section, name, f"{section}.{name}")
            fields[name] = _fit(value, expected, f"{section}.{name}")
        sections[section] = _SECTIONS[section](**fields)
    return Config(**sections)


def to_toml(config: Config) -> str:
    """The whole configuration as a recipe; `load_config` of it gives an equal configuration."""
    import tomli_w  # here, so that a machine without it can check a configuration and run the tests

    return tomli_w.dumps(dataclasses.asdict(config))


def _known(name: str, known: Iterable[str], what: str, prefix: str) -> None:
    """Refuse a name that is not among the known ones, telling the nearest."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
    remedy = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(prefix + item for item in known)}"
    raise UserError(f"{shown(what)} is unknown; {remedy}")


def _field_type(section: str, name: str, what: str) -> Any:
    """The declared type of section.name; an unknown one is refused with the nearest of all fields."""
    if section in _FIELDS and name in _FIELDS[section]:
        return _FIELDS[section][name]
    everywhere = [f"{other}.{field}" for other, fields in _FIELDS.items() for field in fields]
    same_name = [path for path in everywhere if path.endswith(f".{name}")]
    same_section = [path for path in everywhere if path.startswith(f"{section}.")]
    word = f"{section}.{name}"[:80]
    near = same_name or difflib.get_close_matches(word, same_section, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(word, everywhere, n=1, cutoff=0.5)
    if near:
        raise UserError(f"{shown(what)} is unknown; did you mean {near[0]}?")
    if same_section:
        raise UserError(f"{shown(what)} is unknown; [{section}] has {', '.join(_FIELDS[section])}")
    raise UserError(f"{shown(what)} is unknown; sections are {', '.join(_SECTIONS)}")


def _from_text(text: str, expected: Any) -> Any:
    """The value of a command-line word: bare strings as they are, everything else in TOML."""
    expected, _ = split_annotation(expected)
    quotes = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    if (expected is str or get_origin(expected) is Literal) and not quotes:
        return text
    if text in ("True", "False"):
        text = text.lower()
    try:
        tables = parse_toml(f"value = {text}")
    except ValueError:
        return text  # a bare word: fits where one prefix may stand for a list, and is refused by name elsewhere
    return tables["value"] if len(tables) == 1 else text  # a value has only one line


def _fit(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the declared type, without loss and within the field's bounds."""
    expected, _ = split_annotation(annotation)
    fitted = _fit_type(value, expected, path)
    if message := refusal(fitted, annotation, path):
        raise UserError(message)
    return fitted


def _fit_type(value: Any, expected: Any, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = number and (isinstance(value, int) or math.isfinite(value))
    if expected is bool and isinstance(value, bool):
        return value
    if expected is int and finite and value == int(value):
        return int(value)
    if expected is float and finite:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path} = {shown(value)} is too large for a number") from None
    if expected is str and isinstance(value, str):
        if problem := text_problem(value):
            raise UserError(f"{path} = {shown(value)} {problem}; give a name or a path without it")
        return value
    if get_origin(expected) is Literal and isinstance(value, str):
        if value in get_args(expected):
            return value
        near = difflib.get_close_matches(value[:80].lower(), get_args(expected), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{path} = {quoted(value)} is not one of {', '.join(get_args(expected))}{hint}")
    if get_origin(expected) is dict and isinstance(value, dict):
        return value
    if get_origin(expected) is tuple:
        return _fit_list(value, get_args(expected)[0], path)
    raise UserError(f"{path} = {quoted(value)} is not {describe(expected)}")


def _fit_list(value: Any, item: Any, path: str) -> tuple[Any, ...]:
    """A tuple of items; one bare string is a list of one, and of numbers if these stand there with commas."""
    if item is Any:
        return plain_sources(parse_sources([value] if isinstance(value, str) else value, path))
    if isinstance(value, str):
        value = [_from_text(part.strip(), item) for part in value.split(",")]
    if not isinstance(value, list | tuple):
        raise UserError(f"{path} = {quoted(value)} is not {describe(tuple[item, ...])}")
    return tuple(_fit(entry, item, f"{path}[{index}]") for index, entry in enumerate(value))


def describe(annotation: Any) -> str:
    """A description of the values of this type, for a message."""
    expected, _ = split_annotation(annotation)
    if get_origin(expected) is Literal:
        return f"one of {', '.join(get_args(expected))}"
    if get_origin(expected) is tuple:
        item, _ = split_annotation(get_args(expected)[0])
        if get_origin(item) is Literal:
            return f"a list of names among {', '.join(get_args(item))}"
        kinds = {
            int: "whole numbers, as [1, 2]",
            float: "numbers, as [0.9, 0.1]",
            str: 'names, as ["a", "b"]',
            Any: 'prefixes, as ["a", "b"]',
        }
        return f"a list of {kinds[item]}"
    if get_origin(expected) is dict:
        return 'a table, as {type = "llama3", factor = 8.0}'
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}[expected]
