"""Clean raw text: quality rules of Gopher, C4 and FineWeb, optional classifiers, masking of addresses, and a report.

python tools/clean_data.py --input 'raw/*.jsonl.gz' --output clean
"""

import argparse
import time

from megalite.cli import Parser, file_path, program
from megalite.text.clean.clean_report import write_report
from megalite.text.clean.cleaner import clean_corpus
from megalite.text.clean.rules import load_rules
from megalite.text.input_files import expand_inputs
from megalite.text.options import add_input, add_output, add_work


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "The shards are .jsonl.zst; every rejection is counted by rule in the report.")
    add_input(parser)
    add_output(parser)
    add = parser.add_argument
    add(
        "--config",
        type=file_path,
        metavar="RULES.toml",
        help="rules over the defaults; all are written to DIR/rules.toml",
    )
    add(
        "--keep-rejected",
        action="store_true",
        help="also write rejected documents, with rejected_by and rejected_value, to DIR/rejected",
    )
    add_work(parser, max_bad_ratio=0.01)
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
