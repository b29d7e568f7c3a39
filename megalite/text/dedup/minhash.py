"""MinHash of word shingles and its bands (Broder, 1997; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, 3.4).

Two texts agree in one MinHash value with a probability equal to the Jaccard similarity J of their shingle sets, so in
all `rows` values of one band with J^rows, and in at least one of the bands with 1 - (1 - J^rows)^bands.

S: shingles of a text; P: hash functions, bands x rows; B: bands
"""

from dataclasses import dataclass

import numpy as np

from megalite.errors import UserError
from megalite.text.words import WordNumbers, comparable_words, mix, ngram_hashes

HASH_BUDGET = 128  # hash functions that the automatic choice may spend
WANTED_RECALL = 0.98  # of the automatic choice, for pairs exactly at the threshold
_BLOCK = 1024  # shingles hashed at a time: the [P, block] values stay in the processor's cache


@dataclass(frozen=True)
class Banding:
    """How the hash values are grouped into bands."""

    bands: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Probability that a pair of this Jaccard similarity becomes a candidate."""
        return 1.0 - (1.0 - similarity**self.rows) ** self.bands


def choose_banding(threshold: float, bands: int | None = None, rows: int | None = None) -> Banding:
    """The user's banding, or the one with most rows (fewest false candidates) that finds nearly all at the threshold.

    Raises:
        UserError: only one of the two given, values out of range, or a threshold outside (0, 1].
    """
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"--threshold {threshold} must be above 0 and at most 1")
    if (bands is None) != (rows is None):
        raise UserError("--bands and --rows go together: give both, or neither for the automatic choice")
    if bands is not None and rows is not None:
        if bands < 1 or rows < 1 or bands * rows > 4096:
            raise UserError(f"--bands {bands} --rows {rows}: both must be at least 1 and their product at most 4096")
        return Banding(bands, rows)
    choices = [Banding(HASH_BUDGET // rows, rows) for rows in range(1, HASH_BUDGET + 1)]
    return next((c for c in reversed(choices) if c.recall(threshold) >= WANTED_RECALL), choices[0])


class Sketcher:
    """Shingles of texts, their MinHash values and the band keys made from these, the same on every machine."""

    def __init__(self, banding: Banding, ngram: int = 5, seed: int = 1) -> None:
        """Make the hash functions x -> a * x + b mod 2^32, with a odd."""
        count = banding.bands * banding.rows
        random = np.random.Generator(np.random.PCG64(seed))
        self.banding = banding
        self.ngram = ngram
        self.numbers = WordNumbers()
        self._factors_P1 = random.integers(0, 1 << 32, (count, 1), dtype=np.uint32) | np.uint32(1)
        self._offsets_P1 = random.integers(0, 1 << 32, (count, 1), dtype=np.uint32)
        self._values_PS = np.empty((count, _BLOCK), np.uint32)

    def word_numbers(self, text: str) -> np.ndarray:
        """Numbers of the words that comparison sees, uint64 [W]."""
        return self.numbers.of(comparable_words(text))

    def shingles(self, numbers_W: np.ndarray) -> np.ndarray:
        """The set of word n-grams as sorted 32-bit hashes, uint32 [S]; all words as one shingle where they are fewer.

        With 32 bits two sets of s shingles share about s^2 / 2^32 by accident: 0.0002 for a thousand words.
        """
        if numbers_W.size == 0:
            return np.empty(0, np.uint32)
        hashes = ngram_hashes(numbers_W, min(self.ngram, numbers_W.size)) >> np.uint64(32)
        hashes = np.sort(hashes.astype(np.uint32))
        return hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))]

    def signature(self, shingles_S: np.ndarray) -> np.ndarray:
        """MinHash values of a set that is not empty, uint32 [P]."""
        minima_P = None
        for start in range(0, shingles_S.size, _BLOCK):
            block = shingles_S[start : start + _BLOCK]
            values = self._values_PS[:, : block.size]
            np.multiply(self._factors_P1, block, out=values)
            np.add(values, self._offsets_P1, out=values)
            block_minima = values.min(axis=1)
            minima_P = block_minima if minima_P is None else np.minimum(minima_P, block_minima)
        assert minima_P is not None
        return minima_P

    def band_keys(self, signature_P: np.ndarray) -> np.ndarray:
        """One 64-bit key a band, uint64 [B]; equal keys mean equal values in all rows of the band."""
        values_RB = signature_P.reshape(self.banding.bands, self.banding.rows).T.astype(np.uint64)
        keys_B = np.arange(self.banding.bands, dtype=np.uint64)
        for values_B in values_RB:
            keys_B = mix(keys_B ^ values_B) + values_B
        return mix(keys_B)


def jaccard(first_S: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Jaccard similarity of one sorted set with each of several, float64 [len(others)]."""
    sizes = np.array([other.size for other in others], np.int64)
    joined = np.concatenate(others)
    places = np.searchsorted(first_S, joined)
    places[places == first_S.size] = 0
    shared = np.concatenate(([0], np.cumsum(first_S[places] == joined)))
    ends = np.cumsum(sizes)
    common = shared[ends] - shared[ends - sizes]
    return common / (first_S.size + sizes - common)
