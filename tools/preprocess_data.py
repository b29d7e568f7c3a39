"""Turn files of text into Megatron's token binaries: parallel, resumable, with every unusable record accounted for."""

import os
from dataclasses import dataclass, field
from typing import Literal

import tyro

from megalite.errors import exit_on_user_error
from megalite.text.records import MAX_RECORD_BYTES


@dataclass(frozen=True)
class Options:
    """Write OUTPUT_PREFIX_text_document.bin, .idx and .json (for each of --json-keys). The same command resumes."""

    input: list[str]
    """Files, globs or directories: .jsonl, .txt, .parquet, .warc (each also .gz, .zst), other names as plain text."""
    output_prefix: str
    """Path of the output without its ending."""
    tokenizer_model: str | None = None
    """A sentencepiece .model, or a Hugging Face tokenizer.json or the folder that holds it."""
    tokenizer_type: Literal["sentencepiece", "huggingface", "byte"] | None = None
    """What --tokenizer-model is; by default its name tells. `byte` needs no model."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields or columns to tokenize; each makes an output of its own."""
    append_eod: bool = False
    """Put the end-of-document token after every document."""
    allow_special: bool = False
    """Let special tokens that stand in a text, such as <|endoftext|>, become these tokens (Hugging Face tokenizers).
    Otherwise they are encoded as any other text. Both are counted."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes; their number does not change the output. Default: one for each core."""
    max_bad_ratio: float = 0.05
    """Fail if a larger share of the records cannot be used (empty texts are skipped and not counted as bad)."""
    allow_damaged: bool = False
    """Use what could be read of truncated or corrupt files instead of failing."""
    keep_empty: bool = False
    """Keep empty texts as documents without tokens, as Megatron-LM does: document numbers are then record numbers."""
    max_record_bytes: int = MAX_RECORD_BYTES
    """A longer line, text file or JSON array is counted as unusable; bounds the memory that each worker takes."""


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options)
    from megalite.text.preprocess import PreprocessOptions, preprocess

    for summary in preprocess(PreprocessOptions(**vars(options))):
        facts = summary.description
        again = f", {summary.resumed_shards} of {summary.shards} shards from before" if summary.resumed_shards else ""
        print(
            f"{summary.prefix}: {facts['documents']} documents, {facts['tokens']} tokens ({facts['dtype']}),"
            f" {facts['text_bytes'] / max(facts['tokens'], 1):.3f} bytes per token{again}"
        )
        if facts["skipped_empty"]:
            print(f"skipped: {facts['skipped_empty']} empty texts")
        if count := facts["special_in_text"]:
            outcome = "became these tokens" if facts["allow_special"] else "were encoded as text"
            print(f"special tokens: {count} stood in the texts and {outcome}")
        for reason, count in facts["bad_records"].items():
            print(f"not used: {count} records, {reason}; see {summary.prefix}.bad.jsonl")


if __name__ == "__main__":
    main()
