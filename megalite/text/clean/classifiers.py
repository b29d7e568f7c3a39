"""Language and quality by a fastText model file of the user's; the package that reads it is an optional extra."""

import contextlib
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from megalite.errors import UserError
from megalite.text.clean.filters import Page, Rejection
from megalite.text.clean.rules import Language, Quality

LABEL = "__label__"


class Classifier:
    """A fastText model: label scores of a text."""

    def __init__(self, path: str, section: str) -> None:
        if not path:
            raise UserError(
                f'[{section}] model = "" names no file: give a fastText model, or take {section!r} out of rules'
            )
        if not Path(path).is_file():
            raise UserError(f"[{section}] model = {path!r} is not there: give the path of a fastText model file")
        try:
            import fasttext
        except ImportError:
            remedy = "pip install fasttext-numpy2-wheel (or another build of fasttext)"
            raise UserError(f"[{section}] needs the package fasttext, which is not installed: {remedy}") from None
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self._model: Any = fasttext.load_model(path)
        except ValueError as error:
            raise UserError(f"[{section}] model = {path!r} is not a fastText model: {error}") from None

    def scores(self, text: str) -> dict[str, float]:
        """Score of every label for the text, best first. fastText reads one line, so line breaks become spaces."""
        pairs = self._model.f.predict(text.replace("\n", " ") + "\n", -1, 0.0, "strict")
        return {label: min(1.0, score) for score, label in pairs}


@lru_cache(maxsize=2)
def load_classifier(path: str, section: str) -> Classifier:
    """The model of a file, loaded once a process."""
    return Classifier(path, section)


def language(page: Page, rules: Language) -> Rejection | None:
    """The most likely language must be wanted and sure enough."""
    label, score = next(iter(load_classifier(rules.model, "language").scores(page.text).items()), ("", 0.0))
    name = label.removeprefix(LABEL)
    if name not in rules.languages:
        return Rejection("language.languages", name)
    return Rejection("language.min_score", score) if score < rules.min_score else None


def quality(page: Page, rules: Quality) -> Rejection | None:
    """The score of the wanted label must be high enough."""
    score = load_classifier(rules.model, "quality").scores(page.text).get(rules.label, 0.0)
    return Rejection("quality.min_score", score) if score < rules.min_score else None
