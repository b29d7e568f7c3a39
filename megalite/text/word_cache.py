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
        encode_word: int32 ids of a word as bytes.
        capacity: bytes the cache may hold; when full it starts again from nothing (words that matter soon return).
    """

    def __init__(
        self, split: Callable[[str], list[str]], encode_word: Callable[[str], bytes], capacity: int = CACHE_BYTES
    ) -> None:
        self._split = split
        self._known = KnownWords(encode_word)
        self._capacity = capacity

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
        if self._known.bytes > self._capacity:
            self._known.forget()
        self._learn(words_of_text)
        ids_of = self._known.__getitem__
        return [np.frombuffer(b"".join(map(ids_of, words)), np.int32) for words in words_of_text]

    def _learn(self, words_of_text: Sequence[Sequence[str]]) -> None:
        """Prepare for the words of some texts; here nothing, since each is encoded when it is first looked up."""


class BatchedWordCache(WordCache):
    """For encoders with a high cost per call: the new words of all texts are encoded in one call."""

    def __init__(
        self,
        split: Callable[[str], list[str]],
        encode_words: Callable[[list[str]], Sequence[bytes]],
        capacity: int = CACHE_BYTES,
    ) -> None:
        super().__init__(split, lambda word: encode_words([word])[0], capacity)
        self._encode_words = encode_words

    def _learn(self, words_of_text: Sequence[Sequence[str]]) -> None:
        missing = [word for word in set().union(*words_of_text) if word not in self._known]
        if missing:
            for word, ids in zip(missing, self._encode_words(missing), strict=True):
                self._known.add(word, ids)


class KnownWords(dict[str, bytes]):
    """Ids of words; a word that is not there is encoded and remembered. `bytes` is about the memory taken."""

    def __init__(self, encode_word: Callable[[str], bytes]) -> None:
        super().__init__()
        self.bytes = 0
        self._encode_word = encode_word

    def __missing__(self, word: str) -> bytes:
        return self.add(word, self._encode_word(word))

    def add(self, word: str, ids: bytes) -> bytes:
        """Remember a word's ids and return them."""
        self[word] = ids
        self.bytes += ENTRY_BYTES + len(word) + len(ids)
        return ids

    def forget(self) -> None:
        """Forget all words."""
        self.clear()
        self.bytes = 0


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
