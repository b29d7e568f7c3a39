"""Words and sentences: split at white space, or by spaCy's tokenizer as in FineWeb's library datatrove."""

import re
from functools import lru_cache
from string import punctuation
from typing import Any, Protocol

from megalite.errors import UserError
from megalite.text.clean.rules import Words

_AROUND_WORDS = punctuation + "“”‘’«»„‚…—–•·¿¡。，、；：？！（）【】《》「」"
_SENTENCE_END = re.compile(r"[.?!]+[\"'”’)\]»]*(?:\s+|$)|[。！？｡؟۔।॥։።]+\s*")


class Segmenter(Protocol):
    """Cuts texts for the rules that count words and sentences."""

    def tokens(self, text: str) -> list[str]:
        """The units that shares and n-grams are counted over, punctuation marks included."""
        ...

    def words(self, tokens: list[str]) -> list[str]:
        """The tokens that are words: their length counts, and they may be stop words."""
        ...

    def sentences(self, line: str) -> int:
        """Sentences of a line that is not blank, at least 1."""
        ...


class WhiteSpace:
    """Tokens are separated by white space; words are tokens without surrounding punctuation."""

    def tokens(self, text: str) -> list[str]:
        return text.split()

    def words(self, tokens: list[str]) -> list[str]:
        bare = [token.strip(_AROUND_WORDS) for token in tokens]
        return [word for word in bare if word]

    def sentences(self, line: str) -> int:
        ends = [match.end() for match in _SENTENCE_END.finditer(line)]
        return len(ends) + (not ends or ends[-1] < len(line))  # what follows the last mark is a sentence, too


class SpaCy:
    """spaCy's rule-based tokenizer and sentencizer for a language; words are tokens that are not punctuation alone."""

    def __init__(self, language: str) -> None:
        try:
            import spacy
        except ImportError:
            raise UserError(
                '[words] segmenter = "spacy" needs the package spacy, which is not installed: pip install spacy'
            ) from None
        try:
            self._nlp: Any = spacy.blank(language)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"[words] language = {language!r} cannot be loaded by spaCy: {reason}") from None
        self._nlp.add_pipe("sentencizer")

    def tokens(self, text: str) -> list[str]:
        return [bare for token in self._read(text) if (bare := token.strip())]

    def words(self, tokens: list[str]) -> list[str]:
        return [token for token in tokens if token.strip(_AROUND_WORDS)]

    def sentences(self, line: str) -> int:
        return len([sentence for sentence in self._read(line, sentences=True) if sentence.strip()])

    def _read(self, text: str, sentences: bool = False) -> list[str]:
        self._nlp.max_length = max(self._nlp.max_length, len(text) + 1)
        try:
            with self._nlp.memory_zone():  # or its vocabulary would grow with the corpus
                return self._cut(text, sentences)
        except AssertionError:  # spaCy 3.8 fails so on the names of its own symbols ("IS_ALPHA"), only in a zone
            return self._cut(text, sentences)

    def _cut(self, text: str, sentences: bool) -> list[str]:
        if sentences:
            return [sentence.text for sentence in self._nlp(text).sents]
        return [token.text for token in self._nlp.make_doc(text)]


WHITE_SPACE = WhiteSpace()


@lru_cache(maxsize=2)
def load_segmenter(words: Words) -> Segmenter:
    """The segmenter that the rules name.

    Raises:
        UserError: spaCy is not installed, or does not know the language.
    """
    return WHITE_SPACE if words.segmenter == "whitespace" else SpaCy(words.language)
