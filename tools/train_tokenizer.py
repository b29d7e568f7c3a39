"""Train a sentencepiece BPE tokenizer on text files and report how many bytes of held-out text a token carries."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from megalite.errors import exit_on_user_error


@dataclass(frozen=True)
class Options:
    """Train a sentencepiece BPE tokenizer (byte fallback, text unchanged, exact round trip of white space)."""

    input: list[str]
    """Files, globs or directories: .jsonl, .txt, .parquet, .warc (each also .gz, .zst), other names as plain text."""
    vocab_size: int
    """Entries of the vocabulary, special tokens and the 256 bytes included."""
    output_prefix: str
    """Writes OUTPUT_PREFIX.model and OUTPUT_PREFIX.vocab."""
    json_key: str = "text"
    """Field or column that holds the text."""
    split_digits: bool = True
    """Make every digit a token of its own."""
    special_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
    """Tokens that never come from text, beside <unk>, <s>, </s> (end of document) and <pad>."""
    max_bytes: Annotated[int, tyro.conf.arg(metavar="BYTES")] = 200_000_000
    """Train on a sample of about this many bytes of input; sentencepiece needs about 7 times that in memory."""
    seed: int = 1234
    """Of the sample and of the documents held out."""


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options)
    from megalite.text.tokenizer_training import TrainingOptions, train

    report = train(TrainingOptions(**vars(options)))
    print(f"trained on {report.train_bytes / 1e6:.1f} MB of {report.documents} documents")
    for reason, count in sorted(report.bad.items()):
        print(f"not used: {count} records, {reason}")
    if report.first_bad:
        print(f"first of them: {report.first_bad}")
    where = "held-out text" if report.held_out else "the training text itself (too few documents to hold some out)"
    print(f"{report.bytes_per_token:.3f} bytes per token on {report.measured_bytes / 1e6:.2f} MB of {where}")
    print(f"wrote {options.output_prefix}.model and {options.output_prefix}.vocab ({options.vocab_size} entries)")


if __name__ == "__main__":
    main()
