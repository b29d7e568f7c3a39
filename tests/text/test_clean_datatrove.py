"""FineWeb's definitions against the library that FineWeb was made with, where it is installed."""

import random
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="datatrove is not installed (pip install -e '.[compare]')")
pytest.importorskip("spacy", reason="spacy is not installed (pip install -e '.[compare]')")

from benchmarks.cleaning import FINEWEB, datatrove_judges, megalite_judges
from megalite.text.clean.rules import load_rules
from megalite.text.clean.segment import load_segmenter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def documents(source_texts: list[str]) -> list[str]:
    """This repository's documents and their paragraphs, modules of Python, and both with much repeated."""
    chance = random.Random(7)
    prose = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]]
    parts = [part for text in [*prose, *source_texts[:8]] for part in text.split("\n\n") if len(part) > 300][:150]
    lines = [line for text in prose for line in text.split("\n") if len(line) > 40]
    repeated = ["\n".join(chance.choices(chance.sample(lines, 12), k=30)) for _ in range(30)]
    return [*prose, *parts, *repeated, *(text.replace("{", "(") for text in [*parts, *prose])]


def test_decisions_are_those_of_datatrove(documents: list[str]) -> None:
    mine, theirs = megalite_judges(load_rules(FINEWEB)), datatrove_judges()
    for group in mine:
        differing = [
            (mine[group](text), theirs[group](text), text[:80])
            for text in documents
            if (mine[group](text) is None) != (theirs[group](text) is None)
        ]
        assert len(differing) <= 0.03 * len(documents), (group, differing)


def test_words_are_those_of_datatrove(documents: list[str]) -> None:
    from datatrove.utils.text import split_into_sentences, split_into_words

    segmenter = load_segmenter(load_rules(FINEWEB).words)
    for text in documents[:60]:
        assert segmenter.tokens(text) == split_into_words(text)
        for line in filter(str.strip, text.split("\n")):
            assert segmenter.sentences(line) == len(split_into_sentences(line)), line
    assert segmenter.tokens("IS_ALPHA is a name of spaCy's own")[:2] == ["IS_ALPHA", "is"]
