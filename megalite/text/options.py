"""Command-line options that the tools for text share: what is read, by how many processes, what may be unusable."""

from __future__ import annotations

import os

from megalite.cli import Parser, file_path, number, whole
from megalite.text.records import MAX_RECORD_BYTES


def add_input(parser: Parser) -> None:
    """`--input`, for `expand_inputs`."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="gather",
        required=True,
        metavar="FILE",
        help="files, globs or directories: .jsonl, .txt, .parquet, .warc (each also .gz, .zst), other names as text",
    )


def add_output(parser: Parser) -> None:
    """`--output` and `--key`, of the tools that write documents again."""
    parser.add_argument(
        "--output",
        type=file_path,
        required=True,
        metavar="DIR",
        help="for shards and report; must be new, empty, or left by an interrupted run of the same",
    )
    parser.add_argument(
        "--key", default="text", help="field or column that holds the text; the others are carried over (text)"
    )


def add_work(parser: Parser, max_bad_ratio: float) -> None:
    """`--workers`, `--max-bad-ratio` with its default, `--allow-damaged` and `--max-record-bytes`."""
    add = parser.add_argument
    add(
        "--workers",
        type=whole(1, 4096),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes, which do not change the output (default: one for each core)",
    )
    add(
        "--max-bad-ratio",
        type=number(0, 1),
        default=max_bad_ratio,
        metavar="SHARE",
        help="of records that may be unusable (broken JSON, missing key, ...) before the run fails; "
        f"empty texts do not count ({max_bad_ratio})",
    )
    add("--allow-damaged", action="store_true", help="use what can be read of truncated or corrupt compressed files")
    add(
        "--max-record-bytes",
        type=whole(),
        default=MAX_RECORD_BYTES,
        metavar="BYTES",
        help="a longer line, text file or JSON array is unusable; bounds the memory of each worker",
    )
