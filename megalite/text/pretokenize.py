"""The words that byte-level Hugging Face tokenizers cut a text into, found by Python's own regular expressions.

Such a tokenizer first cuts a text by one regular expression and then encodes each word by itself. The expressions in
use are few, so each is written down here in Python's dialect. Every one of them ends a word before a space that follows
something else, which is where long texts are cut into segments.
"""

import re
import sys
import unicodedata
from collections.abc import Callable
from itertools import groupby
from typing import Any

from megalite.text.unicode import TokenFinder

_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
_CONTRACTION = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
BMP = 0xFFFF  # classes end here: Python looks the first 65536 characters up in a table, and tries others one by one
_UPPER, _LOWER = "Lu Lt Lm Lo M", "Ll Lm Lo M"  # o200k's two kinds of letters

# From the expression as it stands in tokenizer.json to a function of the character classes
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Classes = Callable[[str], str]


def _gpt2(of: Classes) -> str:
    letter, number = of("L"), of("N")
    return (
        rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[^{_SPACE}{letter}{number}]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _llama3(of: Classes, digits: str = "{1,3}") -> str:
    letter, number = of("L"), of("N")
    return (
        rf"{_CONTRACTION}|[^\r\n{letter}{number}]?[{letter}]+|[{number}]{digits}"
        rf"| ?[^{_SPACE}{letter}{number}]+[\r\n]*|[{_SPACE}]*[\r\n]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def _o200k(of: Classes) -> str:
    letter, number, upper, lower = of("L"), of("N"), of(_UPPER), of(_LOWER)
    before = rf"[^\r\n{letter}{number}]?"
    return (
        rf"{before}[{upper}]*[{lower}]+(?:{_CONTRACTION})?|{before}[{upper}]+[{lower}]*(?:{_CONTRACTION})?"
        rf"|[{number}]{{1,3}}| ?[^{_SPACE}{letter}{number}]+[\r\n/]*|[{_SPACE}]*[\r\n]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


KNOWN: dict[str, Callable[[Classes], str]] = {
    _GPT2: _gpt2,
    _LLAMA3: _llama3,
    _QWEN2: lambda of: _llama3(of, digits=""),
    _O200K: _o200k,
}


class Splitter:
    """Cuts texts into words as one known expression does.

    Args:
        pattern: the expression, given its character classes.
        composes: whether the tokenizer normalises text to NFC first.
        added_tokens: strings that the tokenizer finds in a text before it cuts words.
    """

    def __init__(self, pattern: Callable[[Classes], str], composes: bool, added_tokens: list[str]) -> None:
        classes = _category_ranges()
        self._composes = composes
        self._ascii_words = re.compile(pattern(lambda names: _join(classes, names, 0x7F))).findall
        self._words = re.compile(pattern(lambda names: _join(classes, names, BMP))).findall
        # another version of Unicode may know more characters; U+017F is an s to expressions that ignore case; half a
        # surrogate pair is no character
        beyond = _join(classes, "L N M", sys.maxunicode, smallest=BMP + 1)
        self._uncertain = re.compile(f"[{_join(classes, 'Cn Cs', sys.maxunicode)}{beyond}\u017f]").search
        self._added = TokenFinder(added_tokens)

    def split(self, text: str) -> list[str]:
        """The words of a text that `prepare` has let through; their concatenation is the text."""
        return self._ascii_words(text) if text.isascii() else self._words(text)

    def prepare(self, text: str) -> str | None:
        """The text as the tokenizer's expression sees it, or None where only the tokenizer itself can tell."""
        if self._added.found_in(text):
            return None
        if text.isascii():
            return text
        if self._uncertain("".join(set(text))):
            return None
        return unicodedata.normalize("NFC", text) if self._composes else text


def make_splitter(description: dict[str, Any], allow_special: bool = True) -> Splitter | None:
    """The splitter for the contents of a `tokenizer.json`; None if it does anything that is not known here.

    Without `allow_special` special tokens in a text are text, and only the other added tokens are looked for.
    """
    model, normalizer = description["model"], description.get("normalizer")
    pattern = _pattern_of(description.get("pre_tokenizer") or {})
    normalizer_type = normalizer["type"] if normalizer else None
    added = [token for token in description.get("added_tokens", []) if allow_special or not token["special"]]
    greedy = [token for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if pattern not in KNOWN or model.get("type") != "BPE" or model.get("dropout") or greedy:
        return None
    if normalizer_type not in (None, "NFC"):
        return None
    return Splitter(KNOWN[pattern], normalizer_type == "NFC", [token["content"] for token in added])


def _pattern_of(step: dict[str, Any]) -> str | None:
    """The expression of a byte-level pre-tokenizer: GPT-2's own, or the one in front of it."""
    if step.get("type") == "ByteLevel" and step.get("use_regex") and not step.get("add_prefix_space"):
        return _GPT2
    steps = step.get("pretokenizers", [])
    if len(steps) != 2 or [part["type"] for part in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    if byte_level.get("use_regex") or byte_level.get("add_prefix_space"):
        return None
    return split["pattern"].get("Regex")


def _category_ranges() -> dict[str, list[tuple[int, int]]]:
    """For each general category of Unicode its ranges of code points, surrogates apart."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for category, run in groupby(range(sys.maxunicode + 1), lambda point: unicodedata.category(chr(point))):
        points = list(run)
        ranges.setdefault(category, []).append((points[0], points[-1]))
    return ranges


def _join(classes: dict[str, list[tuple[int, int]]], names: str, largest: int, smallest: int = 0) -> str:
    """The inside of a character class: categories (or first letters of them) between two code points."""
    spans = [span for name in names.split() for known in classes if known.startswith(name) for span in classes[known]]
    inside = [(max(first, smallest), min(last, largest)) for first, last in sorted(spans)]
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in inside if first <= last)
