"""Words of a text as 64-bit numbers, and hashes of word n-grams made from them: what repetition and similarity count.

A word's number is the first 8 bytes of its BLAKE2b digest, so it is the same in every process and on every machine
(Python's own `hash` of a string is not). Texts repeat their words, so a bounded dictionary answers most look-ups.

W: words of a text; N: its n-grams, max(0, W - n + 1)
"""

import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

# Scripts written without spaces: every character counts as a word, or a whole sentence would be one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(r"\w+")
_WORD_OR_CHARACTER = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class WordNumbers(dict[str, int]):
    """Number of a word, remembered; forgets everything when `limit` words are known, which bounds the memory."""

    def __init__(self, limit: int = 1 << 19) -> None:
        super().__init__()
        self.limit = limit

    def __missing__(self, word: str) -> int:
        if len(self) >= self.limit:
            self.clear()
        digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = self[word] = int.from_bytes(digest, "little")
        return number

    def of(self, words: Iterable[str]) -> np.ndarray:
        """Numbers of the words, uint64 [W]."""
        return np.fromiter(map(self.__getitem__, words), np.uint64)


def comparable_words(text: str) -> list[str]:
    """Words of a text for comparing it with others: lower case, composed (NFC), without punctuation and white space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        if _HAS_UNSPACED.search(text):
            return _WORD_OR_CHARACTER.findall(text.lower())
    return _WORD.findall(text.lower())


def extend_ngrams(hashes_N: np.ndarray, numbers_W: np.ndarray, n: int) -> np.ndarray:
    """Hashes of n-grams from those of the (n-1)-grams: each is carried on by the word that follows it. uint64."""
    return hashes_N[: max(0, numbers_W.size - n + 1)] * _STEP + numbers_W[n - 1 :]


def ngram_hashes(numbers_W: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all word n-grams in order of position, uint64 [N], every bit well mixed."""
    hashes = numbers_W
    for length in range(2, n + 1):
        hashes = extend_ngrams(hashes, numbers_W, length)
    return mix(hashes[: max(0, numbers_W.size - n + 1)])


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads every input bit over all output bits (the finaliser of splitmix64)."""
    values = values ^ (values >> np.uint64(30))
    values = values * _MIX_1
    values = values ^ (values >> np.uint64(27))
    values = values * _MIX_2
    return values ^ (values >> np.uint64(31))
