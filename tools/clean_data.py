"""Clean raw text: quality rules of Gopher, C4 and FineWeb, optional classifiers, masking of addresses, and a report.

python tools/clean_data.py --input 'raw/*.jsonl.gz' --output clean
"""

import argparse
import os
import time

from megalite.cli import Parser, file_path, number, program, whole
from megalite.text.clean.clean_report import write_report
from megalite.text.clean.cleaner import clean_corpus
from megalite.text.clean.rules import load_rules
from megalite.text.input_files import expand_inputs
from megalite.text.records import MAX_RECORD_BYTES


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "The shards are .jsonl.zst; every rejection is counted by rule in the report.")
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="gather",
        required=True,
        metavar="FILE",
        help="files, globs or directories: .jsonl, .txt, .parquet, .warc, each also as .gz or .zst",
    )
    add(
        "--output",
        type=file_path,
        required=True,
        metavar="DIR",
        help="for shards and report; must be new, empty, or left by an interrupted run of the same",
    )
    add(
        "--config",
        type=file_path,
        metavar="RULES.toml",
        help="rules over the defaults; all are written to DIR/rules.toml",
    )
    add(
        "--workers",
        type=whole(1, 4096),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes, which do not change the output (default: one for each core)",
    )
    add("--key", default="text", help="field or column that holds the text; the others are carried over (text)")
    add(
        "--keep-rejected",
        action="store_true",
        help="also write rejected documents, with rejected_by and rejected_value, to DIR/rejected",
    )
    add(
        "--max-bad-ratio",
        type=number(0, 1),
        default=0.01,
        metavar="SHARE",
        help="of records that may be unusable (broken JSON, missing key, ...) before the run fails (0.01)",
    )
    add("--allow-damaged", action="store_true", help="use what can be read of truncated or corrupt compressed files")
    add(
        "--max-record-bytes",
        type=whole(),
        default=MAX_RECORD_BYTES,
        metavar="BYTES",
        help="a longer line, text file or JSON array is unusable; bounds the memory of each worker",
    )
    return parser.parse_args()


@program
def main() -> None:
    options = parse()
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
