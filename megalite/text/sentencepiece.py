"""sentencepiece models (`.model`), with the exact word cache where the model allows it."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megalite.errors import UserError
from megalite.text.foreign import library_errors, read_small_file
from megalite.text.unicode import TokenFinder, without_surrogates
from megalite.text.word_cache import WordCache

LOG = logging.getLogger(__name__)
LARGEST_FILE = 512 << 20
SPACE_MARK = "\u2581"  # sentencepiece's own sign for a space: the same character to it, in text, too
BPE = 2  # TrainerSpec.ModelType
WORDS_PER_CALL = 200  # short words joined: a call costs more than a word
CHECKED_CHARACTERS = 1 << 16
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false; the last value counts

# Ways to cut a text, finest first. Whether there is a cut between two characters depends on these two alone.
# Beyond ASCII everything counts as a letter: fewer cuts, so never a wrong one.
_LETTER = r"A-Za-z\x80-\U0010ffff"
SPLITTERS = (
    re.compile(rf" *[{_LETTER}]+| *[^{_LETTER} \n]+| +|\n").findall,
    re.compile(r" +[^ \n]*|[^ \n]+|\n").findall,
)
_SAMPLE = (
    "The quick  brown\tfox, (it's 12.50) jumps\n\n    over_the <lazy> dog\r\n\u00fcber na\u00efve \u4f60\u597d\u3002"
    " \U0001f600\u200d x\u2581y\u2581 \u2581z \x00\x7f e\u0301 <s></s> \u0645\u0631 10,000 a1b2  \n \n"
)


class SentencePieceTokenizer:
    """A sentencepiece model; the end of a document is the model's `eos`. See `Tokenizer` for the interface.

    U+2581 in a text comes back as a space: the model cannot tell them apart.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, use_cache: bool = True) -> None:
        try:
            data = read_small_file(path, LARGEST_FILE)
        except OSError as error:
            raise UserError(
                f"tokenizer {path}: cannot be read ({error.strerror}); give a sentencepiece .model"
            ) from error
        self.files = [path]
        self._unchecked = CHECKED_CHARACTERS
        self._prefix = ""
        with library_errors(path, "not a sentencepiece model; train one with train_tokenizer.py"):
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.vocab_size: int = self._model.vocab_size()
            self.eod = self.eos = _known(self._model.eos_id())
            self.bos = _known(self._model.bos_id())
            self.pad = _known(self._model.pad_id())
            pieces = list(map(self._model.id_to_piece, range(self.vocab_size)))  # refuses those that are not UTF-8
            self.special_tokens = {
                piece: number for number, piece in enumerate(pieces) if self._model.is_control(number)
            }
            self._special_tokens = TokenFinder(list(self.special_tokens))
            self._cache = self._make_cache() if use_cache else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = list(map(without_surrogates, texts))
        if self._cache is None:
            return [self._direct(text) for text in texts]
        encoded = self._cached(texts)
        if self._unchecked > 0 and not self._agrees(texts, encoded):
            self._cache = None
            return self.encode_batch(texts)
        return encoded

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        array = np.asarray(ids, np.int64)
        with library_errors(self.files[0], "it cannot decode these ids"):
            return self._model.decode(array[(array >= 0) & (array < self.vocab_size)].tolist())

    def count_special(self, text: str) -> int:
        return self._special_tokens.count(text)

    def token_id(self, piece: str) -> int | None:
        """The id of this very piece, such as a chat marker; None if the model has none."""
        number = self._model.piece_to_id(without_surrogates(piece))
        return None if self._model.is_unknown(number) else number

    def _direct(self, text: str) -> np.ndarray:
        with library_errors(self.files[0], "it cannot encode this text"):
            return np.asarray(self._model.encode(text, return_type="numpy"), np.int32)

    def _cached(self, texts: Sequence[str]) -> list[np.ndarray]:
        assert self._cache is not None
        prepared = [self._prefix + text.replace(SPACE_MARK, " ") if text else "" for text in texts]
        return self._cache.encode_batch(prepared)

    def _agrees(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> bool:
        """Compare the first texts with what the model itself makes of them: the argument is checked on the data."""
        for text, ids in zip(texts, encoded, strict=True):
            if self._unchecked <= 0:
                break
            if len(text) > 4 * CHECKED_CHARACTERS:
                continue
            self._unchecked -= len(text)
            if not np.array_equal(ids, self._direct(text)):
                LOG.warning("%s: the word cache disagrees with the model and is switched off", self.files[0])
                return False
        return True

    def _make_cache(self) -> WordCache | None:
        """The cache, where it is exact: byte-pair model, bytes for the unknown, text taken as it is, no piece cut."""
        proto = self._model.serialized_model_proto()
        top = _fields(proto)
        trainer, normalizer = _fields(top.get(2, b"")), _fields(top.get(3, b""))
        exact_text = not normalizer.get(2) and normalizer.get(4, 1) == 0 and normalizer.get(5, 1) == 1
        if trainer.get(3, 1) != BPE or trainer.get(24, 0) or not trainer.get(35, 0) or not exact_text:
            return None
        model = self._model
        if normalizer.get(3, 1):  # the model puts a space before each text, but words in the middle of one have none
            model = sentencepiece.SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)
            self._prefix = " "
        newline = model.encode("\n")
        pieces = [
            model.id_to_piece(number).replace(SPACE_MARK, " ")
            for number in range(self.vocab_size)
            if not (model.is_control(number) or model.is_byte(number) or model.is_unknown(number))
        ]
        for split in SPLITTERS:
            if len(newline) == 1 and all(len(split(piece)) == 1 for piece in pieces):
                self._cache = WordCache(split, _WordEncoder(model, newline[0]))
                if np.array_equal(self._cached([_SAMPLE])[0], self._direct(_SAMPLE)):
                    return self._cache
        return None


class _WordEncoder:
    """Encodes words many at a time: joined by newlines, each of which is one id that nothing else gives."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor, newline: int) -> None:
        self._model = model
        self._newline = newline

    def __call__(self, words: list[str]) -> list[bytes]:
        # a word never holds a newline unless it is one: those two ids in a row would read as two empty words
        texts = [
            "\n".join(words[start : start + WORDS_PER_CALL]) + "\n" for start in range(0, len(words), WORDS_PER_CALL)
        ]
        ids = np.concatenate(self._model.encode(texts, return_type="numpy", num_threads=1)).astype(np.int32, copy=False)
        is_newline_word = [word == "\n" for word in words]
        ends = np.flatnonzero(ids == self._newline)
        if any(is_newline_word):
            position = is_newline_word.index(True)
            ends = np.delete(ends, position)  # the newline that is the word itself, before the one that ends it
        starts = np.concatenate([[0], ends[:-1] + 1])
        data = ids.tobytes()
        return [data[4 * start : 4 * end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _known(number: int) -> int | None:
    return number if number >= 0 else None


def _fields(message: bytes) -> dict:
    """The last value of each field of a protocol buffer message: integers, or bytes of nested ones."""
    return dict(_walk(message))


def _walk(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
        else:
            size, position = _varint(message, position) if wire == 2 else (8 if wire == 1 else 4, position)
            yield tag >> 3, message[position : position + size]
            position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
