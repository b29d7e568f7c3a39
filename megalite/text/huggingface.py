"""Hugging Face fast tokenizers: a `tokenizer.json`, or the folder that holds it."""

import array
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from megalite.errors import UserError
from megalite.text.pretokenize import make_splitter
from megalite.text.tokenizers import LOG
from megalite.text.word_cache import WordCache

CHECKED_CHARACTERS = 1 << 16
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")


class HuggingFaceTokenizer:
    """A `tokenizer.json`; the end of a document is `eos_token` of the `tokenizer_config.json` beside it.

    Without that file it is the first of `EOD_NAMES` in the vocabulary. See `Tokenizer` for the interface. Where the
    words the library cuts a text into are known (see `megalite.text.pretokenize`), a cache of words stands before it.
    """

    kind = "huggingface"

    def __init__(self, path: Path, use_cache: bool = True) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer {file}: no such file; give a tokenizer.json or the folder that holds it")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise UserError(f"tokenizer {file}: not a Hugging Face tokenizer ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.files = [file]
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if vocabulary := self._tokenizer.get_vocab(with_added_tokens=True):
            self.vocab_size = max(self.vocab_size, max(vocabulary.values()) + 1)
        config = self._config(file.with_name("tokenizer_config.json"))
        self.eod = self.eos = self._special(config.get("eos_token"), EOD_NAMES)
        self.bos = self._special(config.get("bos_token"), BOS_NAMES)
        self._splitter = make_splitter(json.loads(self._tokenizer.to_str())) if use_cache else None
        self._cache = WordCache(self._splitter.split, self._encode_words) if self._splitter else None
        self._unchecked = CHECKED_CHARACTERS

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._cache is None or self._splitter is None:
            return self._direct(texts)
        prepared = list(map(self._splitter.prepare, texts))  # None where the words are not certain
        cached = iter(self._cache.encode_batch([text for text in prepared if text is not None]))
        direct = iter(self._direct([text for text, ready in zip(texts, prepared, strict=True) if ready is None]))
        encoded = [next(direct if ready is None else cached) for ready in prepared]
        if self._unchecked > 0 and not self._agrees(texts, encoded):
            self._cache = None
            return self._direct(texts)
        return encoded

    def _agrees(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> bool:
        """Compare the first texts with what the library itself makes of them."""
        for text, ids in zip(texts, encoded, strict=True):
            if self._unchecked <= 0:
                break
            self._unchecked -= len(text)
            if not np.array_equal(ids, self._direct([text])[0]):
                LOG.warning("%s: the word cache disagrees with the tokenizer and is switched off", self.files[0])
                return False
        return True

    def _encode_words(self, words: list[str]) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        return [array.array("i", encoding.ids).tobytes() for encoding in encodings]

    def _direct(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def token_id(self, piece: str) -> int | None:
        """The id of this very token, such as a chat marker; None where there is none."""
        return self._tokenizer.token_to_id(piece)

    def _config(self, path: Path) -> dict:
        if not path.is_file():
            return {}
        self.files.append(path)
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"tokenizer {path}: not JSON ({error})") from None

    def _special(self, named: object, candidates: Sequence[str]) -> int | None:
        content = named.get("content") if isinstance(named, dict) else named
        for name in [content] if isinstance(content, str) else candidates:
            if (number := self._tokenizer.token_to_id(name)) is not None:
                return number
        return None
