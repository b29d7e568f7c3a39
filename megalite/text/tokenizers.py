"""Tokenizers behind one small interface: sentencepiece, Hugging Face `tokenizer.json`, and raw bytes. No torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megalite.errors import UserError
from megalite.text.unicode import without_surrogates

KINDS = ("sentencepiece", "huggingface", "byte")
TEMPLATE_FILE = "chat_template.jinja"
"""Name of the chat template beside a tokenizer, and in a checkpoint."""


class Tokenizer(Protocol):
    """The tokenizer interface of the tools and the trainer. Ids are int32 arrays; no special id is added by encoding.

    Half a surrogate pair in a text (what Python makes of bytes that are not UTF-8) is encoded as U+FFFD.

    Attributes:
        kind: one of `KINDS`.
        vocab_size: every id is below it.
        eod: id put after each document, or None if the tokenizer has none.
        bos: id of the beginning of a text, or None.
        files: the files it was loaded from, in a fixed order (empty for `byte`).
        special_tokens: the tokens that chat templates write as text, such as `<|im_end|>`, and their ids.
    """

    kind: str
    vocab_size: int
    eod: int | None
    bos: int | None
    files: list[Path]
    special_tokens: dict[str, int]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, int32 [tokens]."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of these ids; invalid UTF-8 (a truncated character) becomes U+FFFD.

        Ids that the tokenizer does not have, such as those that pad a model's vocabulary, are left out.
        """
        ...

    def count_special(self, text: str) -> int:
        """How often a special token (end of document, chat marker, …) stands in the text as plain characters."""
        ...


def load_tokenizer(path_or_kind: str | Path, kind: str | None = None, allow_special: bool = True) -> Tokenizer:
    """Load a tokenizer: a sentencepiece `.model`, a `tokenizer.json` or the folder that holds it, or the word `byte`.

    Args:
        path_or_kind: the file, the folder, or `byte`.
        kind: one of `KINDS`; overrides the file name.
        allow_special: whether special tokens that stand in a text become these tokens where the library does so
            (Hugging Face); sentencepiece and bytes never make them of text.

    Raises:
        UserError: no such file, a file of another kind, or an unknown kind.
    """
    path = Path(path_or_kind)
    kind = kind or _kind_of(path)
    if kind == "byte":
        return ByteTokenizer()
    if kind not in KINDS:
        raise UserError(f"tokenizer type {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if kind == "huggingface":
        from megalite.text.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, allow_special=allow_special)
    from megalite.text.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def _kind_of(path: Path) -> str:
    if str(path) == "byte":
        return "byte"
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such file; give a sentencepiece .model, a tokenizer.json, or 'byte'")
    return "huggingface" if path.is_dir() or path.suffix == ".json" else "sentencepiece"


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 (hex) of the kind and the files' contents, so that a copy elsewhere is the same tokenizer."""
    digest = hashlib.sha256(tokenizer.kind.encode())
    for path in tokenizer.files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class ByteTokenizer:
    """UTF-8 bytes 0 to 255, and 256 for the end of a document (also the beginning)."""

    kind = "byte"
    vocab_size = 257
    eod: int | None = 256
    bos: int | None = 256

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.special_tokens = {"<|endoftext|>": 256}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(without_surrogates(text).encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, np.int64)
        return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def count_special(self, text: str) -> int:
        return 0


class IncrementalDecoder:
    """Text that grows token by token, for generation: what `feed` returns adds up to `decode` of all ids.

    A character whose bytes are not complete yet is held back until they are, or until `finish`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids before it are only there so that the next ones decode as in the middle of a text
        self._shown = 0  # ids before it have been turned into text

    def feed(self, token: int) -> str:
        """The text that this token completes, maybe nothing."""
        self._ids.append(int(token))
        new = self._new_text()
        if new.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return new

    def finish(self) -> str:
        """What was held back."""
        new = self._new_text()
        self._context = self._shown = len(self._ids)
        return new

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]
