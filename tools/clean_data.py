"""Clean raw text: quality rules of Gopher, C4 and FineWeb, optional classifiers, masking of addresses, and a report.

python tools/clean_data.py --input 'raw/*.jsonl.gz' --output clean
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from megalite.errors import UserError, exit_on_user_error
from megalite.text.clean.clean_report import write_report
from megalite.text.clean.cleaner import clean_corpus
from megalite.text.clean.rules import load_rules
from megalite.text.input_files import expand_inputs
from megalite.text.records import MAX_RECORD_BYTES


@dataclass(frozen=True)
class Options:
    """Clean raw text into .jsonl.zst shards; every rejection is counted by rule in a report."""

    input: tuple[str, ...]
    """Files, globs or directories: .jsonl, .txt, .parquet, .warc, each also as .gz or .zst."""
    output: Path
    """Directory for the shards and the report; must be new, empty, or left by an interrupted run of the same."""
    config: Path | None = None
    """TOML file of rules over the defaults; the rules in force are written to OUTPUT/rules.toml."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes. The output does not depend on them."""
    key: str = "text"
    """Field or column that holds the text; the others are carried over."""
    keep_rejected: bool = False
    """Also write rejected documents, with `rejected_by` and `rejected_value`, to OUTPUT/rejected."""
    max_bad_ratio: float = 0.01
    """Share of records that may be unusable (broken JSON, missing key, ...) before the run fails."""
    allow_damaged: bool = False
    """Accept truncated or corrupt compressed files: what can be read of them is used."""
    max_record_bytes: int = MAX_RECORD_BYTES
    """A longer line, text file or JSON array is counted as unusable; bounds the memory that each worker takes."""


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options)
    for name in ("workers", "max_record_bytes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    started = time.monotonic()
    counts, unusable = clean_corpus(
        expand_inputs(options.input),
        options.output,
        load_rules(options.config),
        key=options.key,
        workers=options.workers,
        keep_rejected=options.keep_rejected,
        max_bad_ratio=options.max_bad_ratio,
        allow_damaged=options.allow_damaged,
        max_record_bytes=options.max_record_bytes,
    )
    write_report(options.output, counts, unusable, time.monotonic() - started)


if __name__ == "__main__":
    main()
