"""Remove exact and near duplicates from text, and documents that contain benchmark text; with a report.

python tools/dedup_data.py --input 'clean/*.jsonl.zst' --output unique
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from megalite.errors import UserError, exit_on_user_error
from megalite.text.dedup.clusters import Keep
from megalite.text.dedup.dedup_report import write_report
from megalite.text.dedup.deduplication import Deduplication, Settings
from megalite.text.dedup.minhash import choose_banding
from megalite.text.input_files import expand_inputs
from megalite.text.records import MAX_RECORD_BYTES


@dataclass(frozen=True)
class Options:
    """Remove exact and near duplicates; of each cluster of similar documents one is kept."""

    input: tuple[str, ...]
    """Files, globs or directories: .jsonl, .txt, .parquet, .warc, each also as .gz or .zst."""
    output: Path
    """Directory for the shards and the report; must be new, empty, or left by an interrupted run of the same."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes. The output does not depend on them."""
    threshold: float = 0.8
    """Documents whose sets of word n-grams have at least this Jaccard similarity are duplicates."""
    ngram: int = 5
    """Words in a shingle."""
    bands: int | None = None
    """MinHash bands; with --rows. Chosen by the threshold if not given."""
    rows: int | None = None
    """Hash values in a band; more find fewer false candidates and miss more true ones."""
    keep: Keep = "first"
    """Which document of a cluster stays: the first in input order, or the one with most distinct n-grams."""
    decontaminate: tuple[str, ...] = ()
    """Benchmark files: documents that contain a word n-gram of one of their records are removed."""
    decontaminate_key: str = "text"
    """Field of the benchmark records that is searched for."""
    decontaminate_ngram: int = 13
    """Words of an n-gram that counts as contamination."""
    key: str = "text"
    """Field or column that holds the text; the others are carried over."""
    keep_rejected: bool = False
    """Also write removed documents, with `rejected_by` and what they are like, to OUTPUT/rejected."""
    memory: int = 1024
    """Megabytes that each worker may take for sorting."""
    max_bad_ratio: float = 0.01
    """Share of records that may be unusable (broken JSON, missing key, ...) before the run fails."""
    allow_damaged: bool = False
    """Accept truncated or corrupt compressed files: what can be read of them is used."""
    max_record_bytes: int = MAX_RECORD_BYTES
    """A longer line, text file or JSON array is counted as unusable; bounds the memory that each worker takes."""


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options)
    for name in ("workers", "ngram", "decontaminate_ngram", "memory", "max_record_bytes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    settings = Settings(
        threshold=options.threshold,
        banding=choose_banding(options.threshold, options.bands, options.rows),
        ngram=options.ngram,
        keep=options.keep,
        key=options.key,
        decontaminate=tuple(map(str, expand_inputs(options.decontaminate, "--decontaminate"))),
        decontaminate_key=options.decontaminate_key,
        decontaminate_ngram=options.decontaminate_ngram,
        keep_rejected=options.keep_rejected,
        max_bad_ratio=options.max_bad_ratio,
        allow_damaged=options.allow_damaged,
        max_record_bytes=options.max_record_bytes,
    )
    paths = expand_inputs(options.input)
    task = Deduplication(paths, options.output, settings, options.workers, options.memory << 20)
    if task.is_finished():
        task.discard_work()
        print(f"{options.output} is finished already; remove it to do the work again")
        return
    write_report(options.output, task.run())
    task.discard_work()


if __name__ == "__main__":
    main()
