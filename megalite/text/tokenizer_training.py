"""Train a sentencepiece BPE tokenizer on a corpus of any size: a sample is drawn, some documents are held out."""

import io
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from megalite.errors import UserError
from megalite.files import write_atomically, write_errors_named
from megalite.text.foreign import shorten
from megalite.text.formats import can_split
from megalite.text.input_files import expand_inputs
from megalite.text.readers import read_documents
from megalite.text.records import EMPTY, BadRecord
from megalite.text.sentencepiece import SPACE_MARK, SentencePieceTokenizer

CHAT_MARKERS = ("<|im_start|>", "<|im_end|>")
HELD_OUT_SHARE = 0.02
HELD_OUT_BYTES = 4 << 20
SAMPLE_RANGE_BYTES = 1 << 20
FEWEST_RANGES = 64  # a smaller file is read whole: of few ranges chance might take none
LARGEST_VOCABULARY = 1 << 24  # sentencepiece counts in 32 bits, and no model's is near
LINE_CHARACTERS = 4096  # sentencepiece drops longer lines than it is told to expect


@dataclass(frozen=True)
class TrainingOptions:
    """What a tokenizer is trained on and how; see `tools/train_tokenizer.py` for each field."""

    input: Sequence[str]
    vocab_size: int
    output_prefix: str
    json_key: str = "text"
    split_digits: bool = True
    special_tokens: Sequence[str] = CHAT_MARKERS
    max_bytes: int = 200_000_000
    seed: int = 1234


@dataclass
class TrainingReport:
    """What was read and how well the tokenizer does: bytes of UTF-8 per token, and whether on held-out text."""

    documents: int = 0
    train_bytes: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: BadRecord | None = None
    measured_bytes: int = 0
    measured_tokens: int = 0
    held_out: bool = True

    @property
    def bytes_per_token(self) -> float:
        return self.measured_bytes / self.measured_tokens

    def note_bad(self, record: BadRecord) -> None:
        self.bad[record.reason] = self.bad.get(record.reason, 0) + 1
        if record.reason != EMPTY:
            self.first_bad = self.first_bad or record


def train(options: TrainingOptions) -> TrainingReport:
    """Write `output_prefix`.model and .vocab and return what was measured.

    Text is taken as it is: every space, tab and newline round-trips, characters outside the vocabulary become their
    bytes. Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>` (end of document), 3 `<pad>`, then the special tokens. These are never
    produced from text, so no document can fake the end of another or a chat turn.

    Raises:
        UserError: nothing to read, or a vocabulary that the text cannot fill.
    """
    _check(options)
    report, held_out, first_texts = TrainingReport(), list[str](), list[str]()
    lines = _training_lines(options, report, held_out, first_texts)
    first_line = next(lines, None)
    if first_line is None and not held_out:
        why = f"; first of them: {report.first_bad}" if report.first_bad else ""
        raise UserError(f"--input {' '.join(options.input)}: no text in field {options.json_key!r} was found{why}")
    model = _train_model(options, first_line, lines)
    _write(Path(f"{options.output_prefix}.model"), model)
    tokenizer = SentencePieceTokenizer(Path(f"{options.output_prefix}.model"))
    _write(Path(f"{options.output_prefix}.vocab"), _vocabulary(model).encode())
    report.held_out = bool(held_out)
    measured = held_out or first_texts
    report.measured_bytes = sum(len(text.encode()) for text in measured)
    report.measured_tokens = sum(ids.size for ids in tokenizer.encode_batch(measured))
    return report


def _check(options: TrainingOptions) -> None:
    if options.vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size {options.vocab_size}: must be at most {LARGEST_VOCABULARY}")
    smallest = 256 + 4 + len(options.special_tokens) + 1
    if options.vocab_size < smallest:
        raise UserError(
            f"--vocab-size {options.vocab_size}: must be at least {smallest} (256 bytes and special tokens)"
        )
    seen = {"<unk>", "<s>", "</s>", "<pad>"}
    for token in options.special_tokens:
        if not token.isprintable() or not token.strip() or token in seen:
            raise UserError(f"--special-tokens {shorten(token)}: must be printable, and not there already")
        seen.add(token)
    if options.max_bytes < 1:
        raise UserError(f"--max-bytes {options.max_bytes}: must be positive")
    folder = Path(options.output_prefix).parent
    with write_errors_named(f"{options.output_prefix}.model"):
        folder.mkdir(parents=True, exist_ok=True)


def _training_lines(
    options: TrainingOptions, report: TrainingReport, held_out: list[str], first_texts: list[str]
) -> Iterator[str]:
    """The sample's lines; on the way some documents go to `held_out`, and the first ones to `first_texts`."""
    chance = random.Random(options.seed)
    held_bytes = first_bytes = 0
    for text in _sample(options, chance, report):
        report.documents += 1
        size = len(text.encode())
        if first_bytes < HELD_OUT_BYTES:
            first_texts.append(text)
            first_bytes += size
        if held_bytes < HELD_OUT_BYTES and report.documents > 1 and chance.random() < HELD_OUT_SHARE:
            held_out.append(text)
            held_bytes += size
            continue
        report.train_bytes += size
        for line in text.replace(SPACE_MARK, " ").replace("\0", "").split("\n"):
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _sample(options: TrainingOptions, chance: random.Random, report: TrainingReport) -> Iterator[str]:
    """Documents from all over the input, about `max_bytes` of it: byte ranges of large files, else single documents."""
    paths = expand_inputs(options.input)
    share = options.max_bytes / max(1, sum(path.stat().st_size for path in paths))
    for path in paths:
        size = path.stat().st_size
        by_range = share < 1 and can_split(path) and size > FEWEST_RANGES * SAMPLE_RANGE_BYTES
        starts = range(0, size, SAMPLE_RANGE_BYTES) if by_range else [None]
        for start in starts:
            if start is not None and chance.random() >= share:
                continue
            byte_range = None if start is None else (start, start + SAMPLE_RANGE_BYTES)
            for document in read_documents(path, options.json_key, byte_range, report.note_bad, with_extra=False):
                if by_range or share >= 1 or chance.random() < share:
                    yield document.text


def _train_model(options: TrainingOptions, first_line: str | None, lines: Iterator[str]) -> bytes:
    def sentences() -> Iterator[str]:
        if first_line is not None:
            yield first_line
        yield from lines

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=options.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=options.split_digits,
            max_sentence_length=8 * LINE_CHARACTERS,
            train_extremely_large_corpus=options.max_bytes > 1_000_000_000,
            pad_id=3,
            control_symbols=list(options.special_tokens),
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OverflowError) as error:
        raise _training_error(options, error) from error
    return model.getvalue()


def _training_error(options: TrainingOptions, error: Exception) -> UserError:
    words = shorten(error).rstrip(". ") or "no reason given"
    if "vocab" not in words.lower():
        return UserError(f"--input: sentencepiece cannot learn from this text ({words}); give more text")
    if found := re.search(r"<= (\d+)", words):
        return UserError(
            f"--vocab-size {options.vocab_size}: too large for this text; use at most {found.group(1)}, or more text"
        )
    return UserError(
        f"--vocab-size {options.vocab_size}: does not suit this text ({words}); use a smaller one, or more text"
    )


def _vocabulary(model: bytes) -> str:
    """The readable list: piece, a tab, its score; characters that would break a line are escaped."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = []
    for number in range(processor.vocab_size()):
        piece = processor.id_to_piece(number)
        shown = piece if piece.isprintable() else piece.encode("unicode_escape").decode()
        rows.append(f"{shown}\t{processor.get_score(number):g}\n")
    return "".join(rows)


def _write(path: Path, data: bytes) -> None:
    with write_errors_named(path):
        write_atomically(path, data)
