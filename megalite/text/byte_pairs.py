"""Texts to ids for byte-level byte-pair tokenizers, where the merges of `_bpe.cpp` are exactly those of the library."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalite.text._bpe import BytePairs
from megalite.text.word_cache import CACHE_BYTES, segments


class BytePairEncoder:
    """Encodes texts word by word; see `make_encoder`.

    Args:
        split: cuts a text into the words that the tokenizer encodes each by itself.
        pairs: the merges, with the table of words seen.
    """

    def __init__(self, split: Callable[[str], list[str]], pairs: BytePairs) -> None:
        self._split = split
        self._pairs = pairs

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]."""
        return list(map(self._encode, texts))

    def _encode(self, text: str) -> np.ndarray:
        # one segment at a time: its words are still in the processor's cache when they are looked up
        parts = [self._pairs.encode(self._split(segment)) for segment in segments(text)]
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), np.int32)


def make_encoder(
    model: dict[str, Any], split: Callable[[str], list[str]], capacity: int = CACHE_BYTES
) -> BytePairEncoder | None:
    """The encoder for the `model` of a `tokenizer.json`.

    None if it is anything but plain byte pairs: dropout, marks at the ends of words, or a vocabulary without some
    byte (a word with that one would need the library's rules for unknown characters).
    """
    plain = model.get("type") == "BPE" and not any(
        model.get(option) for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    )
    vocabulary: dict[str, int] = model["vocab"] if plain else {}
    characters = byte_characters()
    if not all(character in vocabulary for character in characters):
        return None
    byte_ids = np.array([vocabulary[character] for character in characters], np.int32)
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    rows = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
    merges = np.array(rows, np.int32).reshape(-1, 3)
    return BytePairEncoder(split, BytePairs(byte_ids, merges, _whole_words(model), capacity))


def _whole_words(model: dict[str, Any]) -> dict[bytes, int]:
    """With `ignore_merges` a word that is in the vocabulary is its entry, whatever merging would make of it."""
    if not model.get("ignore_merges"):
        return {}
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    return {
        bytes(map(byte_of.__getitem__, entry)): number
        for entry, number in model["vocab"].items()
        if byte_of.keys() >= set(entry)
    }


def byte_characters() -> str:
    """GPT-2's characters for the bytes 0 to 255: printable ones stand for themselves, others begin at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + number) for number in range(256 - len(printable)))
    return "".join(chr(byte) if byte in printable else next(others) for byte in range(256))
