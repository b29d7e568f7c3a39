"""`--help` of the trainer: every section and field with its kind of value, bounds, default and meaning."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megalite.cli import Parser
from megalite.config.bounds import split_annotation
from megalite.config.schema import Config


def print_help(program: str) -> None:
    """Every section and field, on standard output."""
    parser = Parser("Values of a recipe can be laid over on the command line; lists and tables are written in TOML.")
    parser.prog, parser.usage = program, f"{program} [RECIPE.toml] [--check] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("--check", action="store_true", help="check configuration and data, and leave")
    defaults = Config()
    for section, kind in get_type_hints(Config).items():
        group = parser.add_argument_group(section, inspect.getdoc(kind))
        texts, types = _texts(kind), get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            rules = _rules(types[field.name])
            default = _toml(getattr(getattr(defaults, section), field.name))
            text = f"{texts[field.name]} ({rules}{'; ' if rules else ''}default: {default})".replace("%", "%%")
            group.add_argument(f"--{section}.{field.name}", metavar=_kind(types[field.name]), help=text)
    parser.print_help()


def _texts(section: type) -> dict[str, str]:
    """The text under each field of a section, read from the source."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[statement.target.id] = inspect.cleandoc(str(following.value.value)).replace("\n", " ")
    return texts


def _rules(annotation: Any) -> str:
    plain, bounds = split_annotation(annotation)
    if get_origin(plain) is tuple and not bounds:
        items = _rules(get_args(plain)[0])
        return f"each {items}" if items else ""
    return " and ".join(map(str, bounds))


def _kind(annotation: Any) -> str:
    plain, _ = split_annotation(annotation)
    if get_origin(plain) is Literal:
        return "|".join(get_args(plain))
    names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", tuple: "LIST", dict: "TABLE"}
    return names[get_origin(plain) or plain]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if value or isinstance(value, int | float) else "empty"
