"""Hugging Face fast tokenizers: a `tokenizer.json`, or the folder that holds it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megalite.errors import UserError
from megalite.text.byte_pairs import make_encoder
from megalite.text.foreign import library_errors, read_small_file, shorten
from megalite.text.patterns import may_take_forever, regular_expressions
from megalite.text.pretokenize import make_splitter
from megalite.text.unicode import TokenFinder, without_surrogates

LOG = logging.getLogger(__name__)
LARGEST_FILE = 512 << 20
LARGEST_VOCABULARY = 1 << 24  # no model's is near
CHECKED_CHARACTERS = 1 << 16
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[CLS]")


class HuggingFaceTokenizer:
    """A `tokenizer.json`; the end of a document is `eos_token` in the `tokenizer_config.json` beside it.

    Without that file it is the first of `EOD_NAMES` in the vocabulary. See `Tokenizer` for the interface. Where the
    words the library cuts a text into are known (see `megalite.text.pretokenize`) and merged plainly (see
    `megalite.text.byte_pairs`), these replace the library, with a table of the words seen.

    Args:
        path: the file or its folder.
        use_cache: False leaves all work to the library.
        allow_special: whether special tokens that stand in a text become these tokens, as the library does by default,
            or are encoded as any other text (`split_special_tokens` of transformers).
    """

    kind = "huggingface"

    def __init__(self, path: Path, use_cache: bool = True, allow_special: bool = True) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise UserError(f"tokenizer {file}: no such file; give a tokenizer.json or the folder that holds it")
        self.files = [file]
        self.allow_special = allow_special
        self._tokenizer = _load(file)
        self._tokenizer.encode_special_tokens = not allow_special
        self.vocab_size = _vocabulary_size(self._tokenizer, file)
        description = _describe(self._tokenizer, file)
        config = self._config(file.with_name("tokenizer_config.json"))
        self.eod = self.eos = self._special(config, "eos_token", EOD_NAMES)
        self.bos = self._special(config, "bos_token", BOS_NAMES)
        self.special_tokens: dict[str, int] = {
            token["content"]: token["id"] for token in description.get("added_tokens", []) if token["special"]
        }
        self._special_tokens = TokenFinder(list(self.special_tokens))
        # of two entries with one id the description holds one alone: then only the library knows what it does
        complete = len(description["model"]["vocab"]) == self._tokenizer.get_vocab_size(with_added_tokens=False)
        self._splitter = make_splitter(description, allow_special) if use_cache and complete else None
        self._cache = make_encoder(description["model"], self._splitter.split) if self._splitter else None
        self._unchecked = CHECKED_CHARACTERS

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._cache is None or self._splitter is None:
            return self._direct(texts)
        prepared = list(map(self._splitter.prepare, texts))  # None if the words are not certain
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

    def _direct(self, texts: Sequence[str]) -> list[np.ndarray]:
        with library_errors(self.files[0], "it cannot encode this text"):
            encodings = self._tokenizer.encode_batch_fast(
                list(map(without_surrogates, texts)), add_special_tokens=False
            )
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, np.int64)
        known = array[(array >= 0) & (array < self.vocab_size)].tolist()
        with library_errors(self.files[0], "it cannot decode these ids"):
            return self._tokenizer.decode(known, skip_special_tokens=True)

    def count_special(self, text: str) -> int:
        return self._special_tokens.count(text)

    def puts_bos(self) -> bool:
        """Whether the library's own processing begins every text with `bos`."""
        with library_errors(self.files[0], "it cannot encode this text"):
            return self.bos is not None and self._tokenizer.encode("").ids[:1] == [self.bos]

    def token_id(self, piece: str) -> int | None:
        """The id of this very token, such as a chat marker; None if there is none."""
        return self._tokenizer.token_to_id(without_surrogates(piece))

    def _config(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        self.files.append(path)
        try:
            config = json.loads(read_small_file(path, LARGEST_FILE))
        except OSError as error:
            raise UserError(f"tokenizer {path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting without end
            raise UserError(f"tokenizer {path}: not JSON ({shorten(error)})") from None
        if not isinstance(config, dict):
            raise UserError(f"tokenizer {path}: holds {shorten(config, 40)}, not a JSON object")
        return config

    def _special(self, config: dict[str, Any], field: str, candidates: Sequence[str]) -> int | None:
        """The id of the token that the configuration names, which may be null; else the first candidate there is."""
        named = config.get(field)
        content = named.get("content") if isinstance(named, dict) else named
        if named is not None and not isinstance(content, str):
            raise UserError(f"tokenizer {self.files[-1]}: {field} = {shorten(named)} must be a string or null")
        for name in candidates if content is None else [content]:
            if (number := self.token_id(name)) is not None:
                return number
        return None


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        data = read_small_file(file, LARGEST_FILE)
    except OSError as error:
        raise UserError(f"tokenizer {file}: cannot be read ({error.strerror}); give a tokenizer.json") from None
    with library_errors(file, "not a Hugging Face tokenizer"):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return tokenizer


def _describe(tokenizer: tokenizers.Tokenizer, file: Path) -> dict[str, Any]:
    """The tokenizer as the library loaded it, in canonical form; takes time proportional to the largest id."""
    with library_errors(file, "not a Hugging Face tokenizer"):
        description: dict[str, Any] = json.loads(tokenizer.to_str())
    for expression in regular_expressions(description):
        if may_take_forever(expression):
            raise UserError(
                f"tokenizer {file}: its regular expression {shorten(expression)} repeats a repetition, which can take"
                " exponential time; write it without"
            )
    return description


def _vocabulary_size(tokenizer: tokenizers.Tokenizer, file: Path) -> int:
    """One more than the largest id, or the number of entries where that is more."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= LARGEST_VOCABULARY:
        raise UserError(f"tokenizer {file}: id {largest} is too large; ids must be below {LARGEST_VOCABULARY}")
    return max(tokenizer.get_vocab_size(with_added_tokens=True), largest + 1)
