"""The rules of cleaning as typed values, read from `rules.toml` (the defaults) and from the user's file over it."""

import tomllib
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megalite.errors import UserError
from megalite.text.foreign import read_small_file, shorten

LARGEST_FILE = 16 << 20
LARGEST_NUMBER = 1e15  # of anything that is counted in a document
LARGEST_N = 100  # words of an n-gram
Shares = list[list[float]]  # pairs of n and the largest share allowed


@dataclass(frozen=True)
class Words:
    """Definitions of words and sentences for the other groups; not a rule group itself."""

    segmenter: Literal["whitespace", "spacy"]
    language: str


@dataclass(frozen=True)
class GopherRepetition:
    max_duplicate_lines: float
    max_duplicate_paragraphs: float
    max_duplicate_line_characters: float
    max_duplicate_paragraph_characters: float
    ngram_characters: Literal["covered", "fineweb"]
    max_top_ngram_characters: Shares
    max_duplicate_ngram_characters: Shares


@dataclass(frozen=True)
class GopherQuality:
    min_words: int
    max_words: int
    min_mean_word_length: float
    max_mean_word_length: float
    max_hash_ratio: float
    max_ellipsis_ratio: float
    max_bullet_lines: float
    max_ellipsis_lines: float
    min_alphabetic_words: float
    min_stop_words: int
    stop_words: list[str]


@dataclass(frozen=True)
class C4:
    require_terminal_punctuation: bool
    min_line_words: int
    max_word_length: int
    drop_javascript_lines: bool
    drop_policy_lines: bool
    remove_citations: bool
    reject_lorem_ipsum: bool
    reject_curly_bracket: bool
    min_sentences: int
    bad_words_file: str


@dataclass(frozen=True)
class C4Paragraphs:
    min_long_lines: int
    min_line_characters: int


@dataclass(frozen=True)
class FineWeb:
    min_punctuated_lines: float
    max_short_lines: float
    short_line_characters: int
    max_duplicate_line_characters: float
    max_newlines_per_word: float


@dataclass(frozen=True)
class Language:
    model: str
    languages: list[str]
    min_score: float


@dataclass(frozen=True)
class Quality:
    model: str
    label: str
    min_score: float


@dataclass(frozen=True)
class Privacy:
    mask_emails: bool
    mask_ips: bool
    email: str
    ipv4: str
    ipv6: str


@dataclass(frozen=True)
class Rules:
    """All rules; `rules` names the groups that are applied, in order."""

    rules: list[str]
    words: Words
    gopher_repetition: GopherRepetition
    gopher_quality: GopherQuality
    c4: C4
    c4_paragraphs: C4Paragraphs
    fineweb: FineWeb
    language: Language
    quality: Quality
    privacy: Privacy

    def as_dict(self) -> dict[str, Any]:
        """The plain values, in the shape of the TOML file."""
        return asdict(self)


SECTIONS = {field.name: field.type for field in fields(Rules) if field.name != "rules"}
GROUPS = [name for name in SECTIONS if name != "words"]


@cache
def _default_text() -> str:
    return files("megalite.text.clean").joinpath("rules.toml").read_text(encoding="utf-8")


def load_rules(path: Path | None = None) -> Rules:
    """The default rules with those of a TOML file over them.

    Raises:
        UserError: the file cannot be read, or names an unknown rule or field, or gives a value of the wrong kind.
    """
    values = tomllib.loads(_default_text())
    if path is not None:
        _merge(values, _read(path), path)
    groups = {name: kind(**values[name]) for name, kind in SECTIONS.items()}  # type: ignore[operator]
    return Rules(rules=values["rules"], **groups)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_small_file(path, LARGEST_FILE).decode())
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): give a TOML file of rules") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting without end
        raise UserError(f"--config {path} is not valid TOML: {shorten(error)}") from None


def _merge(values: dict[str, Any], changes: dict[str, Any], path: Path) -> None:
    """Lay the user's values over the defaults, each checked by name and kind."""
    for name, change in changes.items():
        if name == "rules":
            _check_value(values["rules"], change, "rules", path)
            for group in change:
                _check_name(group, GROUPS, "rules names", path)
            values["rules"] = change
            continue
        _check_name(name, ["rules", *SECTIONS], "section", path)
        if not isinstance(change, dict):
            raise UserError(
                f"{path}: {name} = {shorten(change)} must be a section: write [{name}] and its fields below it"
            )
        for field, value in change.items():
            _check_name(field, list(values[name]), f"field [{name}]", path)
            values[name][field] = _check_value(values[name][field], value, f"{name}.{field}", path)
            kind = get_type_hints(SECTIONS[name])[field]
            if get_origin(kind) is Literal and value not in get_args(kind):
                known = " or ".join(f'"{choice}"' for choice in get_args(kind))
                raise UserError(f"{path}: {name}.{field} = {shorten(value)} must be {known}")


def _check_name(name: str, known: list[str], what: str, path: Path) -> None:
    if name in known:
        return
    nearest = get_close_matches(name[:100], known, 1, cutoff=0.4)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
    raise UserError(f"{path}: {what} {shorten(name)} is unknown: {remedy}")


def _check_value(default: Any, value: Any, name: str, path: Path) -> Any:
    """The value in the kind of its default; numbers are not negative, whole ones may stand for fractions."""

    def refuse(right: str) -> UserError:
        return UserError(f"{path}: {name} = {shorten(value)} must be {right}")

    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise refuse("true or false")
    elif isinstance(default, int | float):
        whole = isinstance(default, int)
        if type(value) not in ((int,) if whole else (int, float)) or not 0 <= value <= LARGEST_NUMBER:
            raise refuse(f"a {'whole ' if whole else ''}number of at least 0")
        return value if whole else float(value)
    elif isinstance(default, str):
        if not isinstance(value, str):
            raise refuse("a string")
    elif default and isinstance(default[0], list):
        if not (isinstance(value, list) and all(_is_share(pair) for pair in value)):
            raise refuse(f"a list of [n, share] pairs, n a whole number from 1 to {LARGEST_N}, share at least 0")
        if len({n for n, _ in value}) < len(value):
            raise refuse("a list with one pair for each n")
    elif not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise refuse("a list of strings")
    return value


def _is_share(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and type(pair[0]) is int
        and 1 <= pair[0] <= LARGEST_N
        and type(pair[1]) in (int, float)
        and 0 <= pair[1] <= LARGEST_NUMBER
    )
