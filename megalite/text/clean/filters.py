"""The published quality rules: Gopher, C4, mC4 and FineWeb, each over one page of text.

A rule group is a function of a page and its values that returns the first broken rule, or None. A value that lies
exactly on its limit is accepted. What tokens, words and sentences are is the page's segmenter's to say.
The definitions follow the papers; where these are silent, FineWeb's use of them, as said at each function.

W: tokens of the page; N: its n-grams
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megalite.text.clean.rules import C4, C4Paragraphs, FineWeb, GopherQuality, GopherRepetition
from megalite.text.clean.segment import WHITE_SPACE, Segmenter
from megalite.text.words import WordNumbers, extend_ngrams

_LETTER = re.compile(r"[^\W\d_]")
_ENDS_LINE = (".", "?", "!", '"', "'")  # C4's own list
_ENDS_LINE_ANY_SCRIPT = (
    *_ENDS_LINE,
    "”",
    "’",
    "»",
    "…",
    "。",
    "！",
    "？",
    "｡",
    "؟",
    "۔",
    "।",
    "॥",
    "։",
    "።",
    "』",
    "」",
)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]", re.IGNORECASE)
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_LINE_BREAKS = re.compile(r"\n+")
_PARAGRAPH_BREAKS = re.compile(r"\n{2,}")


@dataclass(frozen=True)
class Rejection:
    """The rule that a page broke (`group.field`, n-gram rules with `[n]`) and the page's value for it."""

    rule: str
    value: float | str


@dataclass
class Page:
    """A text and what the rules need to know of it, computed once; groups that change the text return a new page."""

    text: str
    numbers: WordNumbers = field(repr=False)
    segmenter: Segmenter = field(default=WHITE_SPACE, repr=False)

    def with_text(self, text: str) -> "Page":
        """A page of another text, read in the same way."""
        return replace(self, text=text)

    @cached_property
    def tokens(self) -> list[str]:
        return self.segmenter.tokens(self.text)

    @cached_property
    def words(self) -> list[str]:
        return self.segmenter.words(self.tokens)

    @cached_property
    def mean_word_length(self) -> float:
        return sum(map(len, self.words)) / max(1, len(self.words))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without white space round them."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]


def gopher_repetition(page: Page, rules: GopherRepetition) -> Rejection | None:
    """Repeated lines, paragraphs and word n-grams (Gopher, table A1); as in FineWeb the first copy is no repeat."""
    text = page.text.strip()
    characters = max(1, len(text))
    for parts, count_field, character_field in (
        (_PARAGRAPH_BREAKS.split(text), "max_duplicate_paragraphs", "max_duplicate_paragraph_characters"),
        (_LINE_BREAKS.split(text), "max_duplicate_lines", "max_duplicate_line_characters"),
    ):
        copies, copied_characters = repeated_parts(parts)
        for name, share in ((count_field, copies / len(parts)), (character_field, copied_characters / characters)):
            if share > getattr(rules, name):
                return Rejection(f"gopher_repetition.{name}", share)
    return _repeated_ngrams(page, rules)


def repeated_parts(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts are copies of an earlier one, and their characters."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    copies = characters = 0
    for part in parts:
        if part in seen:
            copies += 1
            characters += len(part)
        else:
            seen.add(part)
    return copies, characters


def _repeated_ngrams(page: Page, rules: GopherRepetition) -> Rejection | None:
    """The n-gram rules, in rising n. No n-gram repeats unless its first n - 1 words do, so most pages end early."""
    numbers_W = page.numbers.of(page.tokens)
    lengths_W = np.fromiter(map(len, page.tokens), np.int64, numbers_W.size)
    fineweb = rules.ngram_characters == "fineweb"
    characters = max(1, len(page.text) if fineweb else int(lengths_W.sum()))
    tops = {int(n): share for n, share in rules.max_top_ngram_characters}
    duplicates = {int(n): share for n, share in rules.max_duplicate_ngram_characters}
    hashes_N = numbers_W
    for n in range(1, max([*tops, *duplicates], default=0) + 1):
        if n > 1:
            hashes_N = extend_ngrams(hashes_N, numbers_W, n)
        if n not in tops and n not in duplicates:
            continue
        order_N = np.argsort(hashes_N, kind="stable")
        sorted_N = hashes_N[order_N]
        same = sorted_N[1:] == sorted_N[:-1]
        if not same.any():
            return None
        if n in tops:
            occurrences = _top_occurrences(order_N, same, lengths_W, n, first=fineweb)
            share = (_summed if fineweb else _covered)(occurrences, n, lengths_W) / characters
            if share > tops[n]:
                return Rejection(f"gopher_repetition.max_top_ngram_characters[{n}]", share)
        if n in duplicates:
            share = _covered(order_N[1:][same], n, lengths_W) / characters
            if fineweb and share > duplicates[n]:  # never less than what the walk finds
                share = _walked(hashes_N, n, lengths_W) / characters
            if share > duplicates[n]:
                return Rejection(f"gopher_repetition.max_duplicate_ngram_characters[{n}]", share)
    return None


def _top_occurrences(order_N: np.ndarray, same: np.ndarray, lengths_W: np.ndarray, n: int, first: bool) -> np.ndarray:
    """Positions of the most frequent n-gram; of equally frequent ones the `first`, or that with the most characters."""
    starts = np.flatnonzero(np.concatenate(([True], ~same)))
    counts = np.diff(np.append(starts, order_N.size))
    best = starts[counts == counts.max()]
    ends_W = np.concatenate(([0], np.cumsum(lengths_W)))
    at = order_N[best]
    start = best[np.argmin(at) if first else np.argmax(ends_W[at + n] - ends_W[at])]
    return order_N[start : start + counts.max()]


def _covered(positions: np.ndarray, n: int, lengths_W: np.ndarray) -> int:
    """Characters of the tokens that n-grams at these positions cover, overlaps counted once."""
    covered_W = np.zeros(lengths_W.size, dtype=bool)
    for offset in range(n):
        covered_W[positions + offset] = True
    return int(lengths_W[covered_W].sum())


def _summed(positions: np.ndarray, n: int, lengths_W: np.ndarray) -> int:
    """Characters of all occurrences of one n-gram with single spaces between its words, overlaps counted each time."""
    return positions.size * (int(lengths_W[positions[0] : positions[0] + n].sum()) + n - 1)


def _walked(hashes_N: np.ndarray, n: int, lengths_W: np.ndarray) -> int:
    """Characters of repeated n-grams as datatrove walks over them: it goes on behind a copy, else by one word."""
    hashes = hashes_N.tolist()
    seen: set[int] = set()
    characters = position = 0
    while position < len(hashes):
        if hashes[position] in seen:
            characters += int(lengths_W[position : position + n].sum())
            position += n
        else:
            seen.add(hashes[position])
            position += 1
    return characters


def gopher_quality(page: Page, rules: GopherQuality) -> Rejection | None:
    """Size, word shape, symbols, bullets, ellipses, letters and stop words (Gopher, section A.1.1)."""
    count = len(page.words)
    if count < rules.min_words:
        return Rejection("gopher_quality.min_words", count)
    if count > rules.max_words:
        return Rejection("gopher_quality.max_words", count)
    if page.mean_word_length < rules.min_mean_word_length:
        return Rejection("gopher_quality.min_mean_word_length", page.mean_word_length)
    if page.mean_word_length > rules.max_mean_word_length:
        return Rejection("gopher_quality.max_mean_word_length", page.mean_word_length)
    tokens, lines = max(1, len(page.tokens)), max(1, len(page.lines))
    text = page.text
    shares = {
        "max_hash_ratio": text.count("#") / tokens,
        "max_ellipsis_ratio": (text.count("...") + text.count("…")) / tokens,
        "max_bullet_lines": sum(line.startswith(("•", "-")) for line in page.lines) / lines,
        "max_ellipsis_lines": sum(line.endswith(("...", "…")) for line in page.lines) / lines,
    }
    for name, share in shares.items():
        if share > getattr(rules, name):
            return Rejection(f"gopher_quality.{name}", share)
    alphabetic = sum(map(str.isalpha, page.tokens)) / tokens  # nearly always enough, and much faster than the search
    if alphabetic < rules.min_alphabetic_words:
        alphabetic = sum(_LETTER.search(token) is not None for token in page.tokens) / tokens
    if alphabetic < rules.min_alphabetic_words:
        return Rejection("gopher_quality.min_alphabetic_words", alphabetic)
    stop_words = len(set(rules.stop_words).intersection(page.words))
    if stop_words < rules.min_stop_words:
        return Rejection("gopher_quality.min_stop_words", stop_words)
    return None


def c4(page: Page, rules: C4, bad_words: re.Pattern[str] | None, removed_lines: dict[str, int]) -> Page | Rejection:
    """C4's rules (Raffel et al., 2020, section 2.2): removes lines, counting them by rule, or rejects the page.

    Unlike C4's own script this keeps single blank lines between the lines that stay, so paragraphs survive. Sentences
    are counted in each line that stays, as there: a line without a full stop is one.
    """
    lowered = page.text.lower()
    if rules.reject_lorem_ipsum and "lorem ipsum" in lowered:
        return Rejection("c4.reject_lorem_ipsum", "lorem ipsum")
    if rules.reject_curly_bracket and "{" in page.text:
        return Rejection("c4.reject_curly_bracket", "{")
    if bad_words is not None and (match := bad_words.search(page.text)):
        return Rejection("c4.bad_words_file", match.group())
    kept: list[str] = []
    sentences = 0
    changed = False
    for raw in page.text.split("\n"):
        line = _CITATION.sub("", raw) if rules.remove_citations and "[" in raw else raw
        changed = changed or line is not raw
        if not line.strip():
            kept.append("")
        elif rule := _broken_line_rule(line, rules):
            removed_lines[rule] = removed_lines.get(rule, 0) + 1
            changed = True
        else:
            kept.append(line)
            if sentences < rules.min_sentences:
                sentences += page.segmenter.sentences(line.strip())
    if changed:
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
        page = page.with_text(text)
    if sentences < rules.min_sentences or not page.text.strip():
        return Rejection("c4.min_sentences", sentences)
    return page


def _broken_line_rule(line: str, rules: C4) -> str | None:
    words = line.split()
    if len(words) < rules.min_line_words:
        return "c4.min_line_words"
    if len(line) > rules.max_word_length and max(map(len, words)) > rules.max_word_length:
        return "c4.max_word_length"
    if rules.require_terminal_punctuation and (not words[-1].endswith(_ENDS_LINE) or words[-1].endswith("...")):
        return "c4.require_terminal_punctuation"
    lowered = line.lower()
    if rules.drop_javascript_lines and "javascript" in lowered:
        return "c4.drop_javascript_lines"
    if rules.drop_policy_lines and any(policy in lowered for policy in _POLICIES):
        return "c4.drop_policy_lines"
    return None


def c4_paragraphs(page: Page, rules: C4Paragraphs) -> Rejection | None:
    """Enough long lines (mC4, Xue et al., 2021, section 3.1)."""
    long_lines = sum(len(line) >= rules.min_line_characters for line in page.lines)
    return Rejection("c4_paragraphs.min_long_lines", long_lines) if long_lines < rules.min_long_lines else None


def fineweb(page: Page, rules: FineWeb) -> Rejection | None:
    """FineWeb's own rules (Penedo et al., 2024, section 3.6), over the lines that are not blank."""
    lines = page.lines
    count = max(1, len(lines))
    punctuated = sum(line.endswith(_ENDS_LINE_ANY_SCRIPT) for line in lines) / count
    if punctuated < rules.min_punctuated_lines:
        return Rejection("fineweb.min_punctuated_lines", punctuated)
    shares = {
        "max_short_lines": sum(len(line) <= rules.short_line_characters for line in lines) / count,
        "max_duplicate_line_characters": repeated_parts(lines)[1] / max(1, sum(map(len, lines))),
        "max_newlines_per_word": (count - 1) / max(1, len(page.tokens)),
    }
    for name, share in shares.items():
        if share > getattr(rules, name):
            return Rejection(f"fineweb.{name}", share)
    return None
