"""Every quality rule at both sides of its threshold, and masking of addresses."""

import random
import string
import time
from dataclasses import replace

import pytest

from megalite.text.clean.filters import (
    Page,
    Rejection,
    c4,
    c4_paragraphs,
    fineweb,
    gopher_quality,
    gopher_repetition,
)
from megalite.text.clean.privacy import mask
from megalite.text.clean.rules import Rules, load_rules
from megalite.text.words import WordNumbers

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def rules() -> Rules:
    return load_rules()


def page(text: str) -> Page:
    return Page(text, WordNumbers())


def words(count: int, length: int = 5, seed: int = 0) -> list[str]:
    """Different random words of one length."""
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(source.choices(string.ascii_lowercase, k=length))] = None
    return list(found)


def rule_of(outcome: Page | Rejection | None) -> str | None:
    return outcome.rule.split(".", 1)[1] if isinstance(outcome, Rejection) else None


def quality_text(plain: int, *extra: str, length: int = 5) -> str:
    """`plain` different words, two of them stop words, and what a case adds."""
    return " ".join(["the", "and", *words(plain - 2, length), *extra])


QUALITY = [
    # rule, accepted (on the limit), rejected (just over it)
    ("min_words", quality_text(50), quality_text(49)),
    ("max_words", "the and " + "words " * 99_998, "the and " + "words " * 99_999),
    # 48 words of length 3 with "the" and "and" are 3.0 on average; one letter less is below
    ("min_mean_word_length", quality_text(60, length=3), quality_text(59, "ab", length=3)),
    # 60 words: (6 + 57 x 10 + 24) / 60 = 10.0
    ("max_mean_word_length", quality_text(59, "x" * 24, length=10), quality_text(59, "x" * 25, length=10)),
    ("max_hash_ratio", quality_text(90, *["#"] * 10), quality_text(90, *["#"] * 11)),
    ("max_ellipsis_ratio", quality_text(89, *["w..."] * 5, *["w…"] * 5, "x"), quality_text(89, *["w..."] * 11, "x")),
    (
        "max_bullet_lines",
        "\n".join([f"- {quality_text(20)}"] * 9 + [quality_text(20)]),
        "\n".join([f"• {quality_text(20)}"] * 10 + [quality_text(20)]),
    ),
    (
        "max_ellipsis_lines",
        "\n".join([quality_text(30) + "…"] * 3 + [quality_text(30)] * 7),
        "\n".join([quality_text(30) + "..."] * 31 + [quality_text(30)] * 69),
    ),
    ("min_alphabetic_words", quality_text(80, *["12345"] * 20), quality_text(80, *["12345"] * 21)),
    ("min_stop_words", quality_text(60), " ".join(["the", "the", "The", *words(60)])),
]


@pytest.mark.parametrize(("rule", "accepted", "rejected"), QUALITY, ids=[case[0] for case in QUALITY])
def test_gopher_quality_thresholds(rules: Rules, rule: str, accepted: str, rejected: str) -> None:
    assert gopher_quality(page(accepted), rules.gopher_quality) is None
    assert rule_of(gopher_quality(page(rejected), rules.gopher_quality)) == rule


REPETITION = [
    # copies of 1-character lines among long ones: the count rule alone
    ("max_duplicate_lines", "\n", ["x"] * 4 + words(6, 40), ["x"] * 5 + words(7, 40)),
    ("max_duplicate_paragraphs", "\n\n", ["x"] * 4 + words(6, 40), ["x"] * 5 + words(7, 40)),
    # the copy has 100 characters of 501, then of 497
    (
        "max_duplicate_line_characters",
        "\n",
        ["y" * 100] * 2 + words(4, 74),
        ["y" * 100] * 2 + words(4, 73),
    ),
    (
        "max_duplicate_paragraph_characters",
        "\n\n",
        ["y" * 100] * 2 + words(5, 58),
        ["y" * 100] * 2 + words(5, 57),
    ),
]


@pytest.mark.parametrize(("rule", "joint", "accepted", "rejected"), REPETITION, ids=[case[0] for case in REPETITION])
def test_gopher_repetition_of_lines(
    rules: Rules, rule: str, joint: str, accepted: list[str], rejected: list[str]
) -> None:
    no_ngrams = replace(rules.gopher_repetition, max_top_ngram_characters=[], max_duplicate_ngram_characters=[])
    assert gopher_repetition(page(joint.join(accepted)), no_ngrams) is None
    assert rule_of(gopher_repetition(page(joint.join(rejected)), no_ngrams)) == rule


@pytest.mark.parametrize(("n", "limit"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_top_ngram_threshold(rules: Rules, n: int, limit: float) -> None:
    """The most frequent n-gram ten times in words of five letters: its share is 10 n words of all words."""
    only = replace(
        rules.gopher_repetition,
        max_top_ngram_characters=[pair for pair in rules.gopher_repetition.max_top_ngram_characters if pair[0] == n],
        max_duplicate_ngram_characters=[],
    )
    assert only.max_top_ngram_characters == [[n, limit]]
    others = round(10 * n / limit) - 10 * n
    for count, expected in ((others + 1, None), (others - 1, f"max_top_ngram_characters[{n}]")):
        source = iter(words(n + count))
        phrase = [next(source) for _ in range(n)]
        spread = [word for _ in range(10) for word in [*phrase, next(source)]] + list(source)
        assert rule_of(gopher_repetition(page(" ".join(spread)), only)) == expected


@pytest.mark.parametrize(("n", "limit"), [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)])
def test_duplicate_ngram_threshold(rules: Rules, n: int, limit: float) -> None:
    """One passage of 2 n words stands twice: the copy's 2 n words are the share, overlaps counted once."""
    only = replace(
        rules.gopher_repetition,
        max_top_ngram_characters=[],
        max_duplicate_ngram_characters=[
            pair for pair in rules.gopher_repetition.max_duplicate_ngram_characters if pair[0] == n
        ],
    )
    assert only.max_duplicate_ngram_characters == [[n, limit]]
    others = round(2 * n / limit) - 4 * n
    for count, expected in ((others + 1, None), (others - 1, f"max_duplicate_ngram_characters[{n}]")):
        source = words(2 * n + count)
        passage, rest = source[: 2 * n], source[2 * n :]
        text = " ".join([*passage, *rest[: count // 2], *passage, *rest[count // 2 :]])
        assert rule_of(gopher_repetition(page(text), only)) == expected


SENTENCES = "One two three four. Five six seven! Is this the eighth? It is. And so ends it all."


def clean_c4(text: str, rules: Rules, **changes: object) -> Page | Rejection:
    return c4(page(text), replace(rules.c4, **changes), None, {})  # type: ignore[arg-type]


def test_c4_document_rules(rules: Rules) -> None:
    assert isinstance(clean_c4(SENTENCES, rules), Page)
    assert rule_of(clean_c4(SENTENCES.replace("It is. ", ""), rules)) == "min_sentences"
    assert rule_of(clean_c4(SENTENCES + " Lorem Ipsum dolor.", rules)) == "reject_lorem_ipsum"
    assert rule_of(clean_c4(SENTENCES + " if (x) {", rules)) == "reject_curly_bracket"
    assert isinstance(clean_c4(SENTENCES + " if (x) {", rules, reject_curly_bracket=False), Page)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("a heading without a stop\n\nIt is one. And two", 3),  # a line is at least one, and so is its unended rest
        ('One? Two! "Three." (Four.)', 4),
        ("version 3.5 of example.org is no end", 1),
        ("今日は晴れ。明日は 雨だ！", 2),
        ("short line.\nkept three words here", 1),  # lines that go do not count
    ],
)
def test_c4_counts_sentences_in_each_line_that_stays(rules: Rules, text: str, sentences: int) -> None:
    small = {"min_line_words": 1 if "今" in text else 3}
    assert isinstance(clean_c4(text, rules, min_sentences=sentences, **small), Page)
    assert clean_c4(text, rules, min_sentences=sentences + 1, **small) == Rejection("c4.min_sentences", sentences)


def test_fineweb_ngram_characters_are_those_of_its_library(rules: Rules) -> None:
    """`a b` three times in 'a b a b c a b': 3 x len('a b') of 13 characters."""
    fineweb = replace(rules.gopher_repetition, ngram_characters="fineweb", max_duplicate_ngram_characters=[])
    text = "a b a b c a b"
    for share, outcome in ((9 / 13, None), (0.69, Rejection("gopher_repetition.max_top_ngram_characters[2]", 9 / 13))):
        assert gopher_repetition(page(text), replace(fineweb, max_top_ngram_characters=[[2, share]])) == outcome
    fineweb = replace(fineweb, max_top_ngram_characters=[], max_duplicate_ngram_characters=[[2, 0.0]])
    found = gopher_repetition(page("x x x x x"), fineweb)  # new at 0, copies at 1 and, behind that, at 3
    assert found == Rejection("gopher_repetition.max_duplicate_ngram_characters[2]", 4 / 9)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Three words stay.", None),
        ("Two words.", "c4.min_line_words"),
        ("It has " + "x" * 1000, None),
        ("It has " + "x" * 1001, "c4.max_word_length"),
        ("Please turn on JavaScript now.", "c4.drop_javascript_lines"),
        ("Read our Privacy Policy here.", "c4.drop_policy_lines"),
    ],
)
def test_c4_line_rules(rules: Rules, line: str, rule: str | None) -> None:
    removed: dict[str, int] = {}
    cleaned = c4(page(f"{SENTENCES}\n{line}\n{SENTENCES}"), rules.c4, None, removed)
    assert isinstance(cleaned, Page)
    assert (line in cleaned.text) == (rule is None)
    assert removed == ({rule: 1} if rule else {})


def test_c4_terminal_punctuation_is_optional(rules: Rules) -> None:
    for ending, stays in ((".", True), ('"', True), ("...", False), ("", False)):
        text = f"{SENTENCES}\nthis line ends in{ending}\n{SENTENCES}"
        strict = clean_c4(text, rules, require_terminal_punctuation=True)
        relaxed = clean_c4(text, rules)
        assert isinstance(strict, Page) and isinstance(relaxed, Page)
        assert ("this line" in strict.text) == stays
        assert "this line" in relaxed.text


def test_c4_keeps_paragraphs_and_indentation_and_drops_citations(rules: Rules) -> None:
    text = f"  {SENTENCES}[12] more[citation needed]\n\nshort line\n\n    indented line stays here."
    cleaned = clean_c4(text, rules)
    assert isinstance(cleaned, Page)
    assert cleaned.text == f"  {SENTENCES} more\n\n    indented line stays here."


def test_mc4_long_lines(rules: Rules) -> None:
    line = "x" * 200
    assert c4_paragraphs(page("\n".join([line] * 3)), rules.c4_paragraphs) is None
    assert rule_of(c4_paragraphs(page("\n".join([line, line, line[:-1]])), rules.c4_paragraphs)) == "min_long_lines"


FINEWEB = [
    (
        "min_punctuated_lines",
        "\n".join([line + (" a b c." if i < 3 else " a b c") for i, line in enumerate(words(25, 40))]),
        "\n".join([line + (" a b c." if i < 2 else " a b c") for i, line in enumerate(words(25, 40))]),
    ),
    (
        "max_short_lines",
        "\n".join([f"{w} a b c d e f g h." for w in words(67, 13)] + [f"{w} a b c d e f g." for w in words(33, 40)]),
        "\n".join([f"{w} a b c d e f g h." for w in words(68, 13)] + [f"{w} a b c d e f g." for w in words(32, 40)]),
    ),
    (
        "max_duplicate_line_characters",
        "\n".join(["ten chars."] * 2 + [f"{w} a b c d e f g." for w in words(20, 34)]),
        "\n".join(["ten chars."] * 2 + [f"{w} a b c d e f g." for w in words(19, 34)]),
    ),
    # 30 line breaks among 100 tokens, then among 99
    (
        "max_newlines_per_word",
        "\n".join([f"{w} a b." for w in words(31, 40)]) + " c" * 7,
        "\n".join([f"{w} a b." for w in words(31, 40)]) + " c" * 6,
    ),
]


@pytest.mark.parametrize(("rule", "accepted", "rejected"), FINEWEB, ids=[case[0] for case in FINEWEB])
def test_fineweb_thresholds(rules: Rules, rule: str, accepted: str, rejected: str) -> None:
    assert fineweb(page(accepted), rules.fineweb) is None
    assert rule_of(fineweb(page(rejected), rules.fineweb)) == rule


@pytest.mark.parametrize("text", ["", " ", "\n\n\n", "...", "-", "漢字かな交じり文", "\x00", "a" * 5000])
def test_odd_texts_break_no_rule_function(rules: Rules, text: str) -> None:
    """Whatever the verdict, there is one: no division by nothing."""
    for group in (gopher_repetition, gopher_quality, fineweb, c4_paragraphs):
        values = getattr(rules, group.__name__)
        assert group(page(text), values) is None or rule_of(group(page(text), values))
    assert rule_of(clean_c4(text, rules, min_sentences=0)) in (None, "min_sentences")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+news@mail.example.org.", "Write to email@example.com."),
        ("<a@b.co>, c_d@e-f.museum", "<email@example.com>, email@example.com"),
        ("not@mail, @handle, a@b.c", "not@mail, @handle, a@b.c"),
        ("from 8.8.8.8, 93.184.216.34:80", "from 192.0.2.1, 192.0.2.1:80"),
        ("at 192.168.0.1 10.1.2.3 127.0.0.1 0.0.0.0", "at 192.168.0.1 10.1.2.3 127.0.0.1 0.0.0.0"),
        ("999.1.1.1 and 1.2.3 and 1.2.3.4.5", "999.1.1.1 and 1.2.3 and 1.2.3.4.5"),
        ("2001:4860:4860::8888 is public.", "2001:db8::1 is public."),
        ("fe80::1 ::1 fd00::2 are not; 12:30:45 is a time", "fe80::1 ::1 fd00::2 are not; 12:30:45 is a time"),
        ("ends 2606:4700:4700:0:0:0:0:1111.", "ends 2001:db8::1."),
        ("C++ std::vector a::b::c", "C++ std::vector a::b::c"),
    ],
)
def test_masking(rules: Rules, text: str, masked: str) -> None:
    counts: dict[str, int] = {}
    assert mask(text, rules.privacy, counts) == masked
    assert bool(counts) == (text != masked)


def test_masking_a_long_run_without_an_address_is_fast(rules: Rules) -> None:
    """A pattern that backtracks would take minutes."""
    started = time.process_time()
    mask("@" + "a." * 100_000 + ":" * 50_000 + "1." * 100_000, rules.privacy, {})
    assert time.process_time() - started < 5
