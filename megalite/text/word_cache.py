"""An exact cache of words in front of a tokenizer: text repeats its words, so most of the work has been done before.

A byte-pair encoder merges only neighbours whose union is in its vocabulary. Where no entry holds the pair of characters
on the two sides of a cut, nothing ever merges across that cut, and the pieces can be encoded apart and joined: the ids
are those of the whole text. Which cuts are safe is decided by the tokenizer's owner (see `megalite.text.tokenizers`).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

CACHE_BYTES = 96 << 20
ENTRY_BYTES = 180  # dictionary entry and two objects, without the characters and ids themselves
SEGMENT_CHARACTERS = 1 << 20


class WordCache:
    """Encodes texts word by word, each distinct word once as long as it stays in the cache.

    Args:
        split: cuts a text into words whose concatenation is the text, at safe places only.
        encode_words: int32 ids of each word as bytes, for words that are not in the cache.
        capacity: bytes the cache may hold; when full it starts again from nothing (words that matter soon return).
    """

    def __init__(
        self,
        split: Callable[[str], list[str]],
        encode_words: Callable[[list[str]], Sequence[bytes]],
        capacity: int = CACHE_BYTES,
    ) -> None:
        self._split = split
        self._encode_words = encode_words
        self._capacity = capacity
        self._bytes = 0
        self._ids: dict[str, bytes] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]."""
        short = [text if len(text) <= SEGMENT_CHARACTERS else "" for text in texts]
        encoded = self._encode(short)
        for index, text in enumerate(texts):
            if len(text) > SEGMENT_CHARACTERS:  # its words alone would fill the memory
                encoded[index] = np.concatenate([self._encode([segment])[0] for segment in segments(text)])
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        words_of_text = list(map(self._split, texts))
        if self._bytes > self._capacity:
            self._ids.clear()
            self._bytes = 0
        missing = [word for word in set().union(*words_of_text) if word not in self._ids]
        if missing:
            encoded = self._encode_words(missing)
            self._ids.update(zip(missing, encoded, strict=True))
            self._bytes += sum(map(len, missing)) + sum(map(len, encoded)) + ENTRY_BYTES * len(missing)
        ids_of = self._ids.__getitem__
        return [np.frombuffer(b"".join(map(ids_of, words)), np.int32) for words in words_of_text]


def segments(text: str, characters: int = SEGMENT_CHARACTERS) -> Iterator[str]:
    """Split a long text before spaces that follow a non-space character: safe for every splitter."""
    start = 0
    while len(text) - start > characters:
        cut = text.find(" ", start + characters)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find(" ", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]
