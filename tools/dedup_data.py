"""Remove exact and near duplicates from text, and documents that contain benchmark text; with a report.

python tools/dedup_data.py --input 'clean/*.jsonl.zst' --output unique
"""

import argparse
from typing import get_args

from megalite.cli import Parser, program, whole
from megalite.text.dedup.clusters import Keep
from megalite.text.dedup.dedup_report import write_report
from megalite.text.dedup.deduplication import Deduplication, Settings
from megalite.text.dedup.minhash import choose_banding
from megalite.text.input_files import expand_inputs
from megalite.text.options import add_input, add_output, add_work


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "Of each cluster of similar documents one is kept.")
    add_input(parser)
    add_output(parser)
    add = parser.add_argument
    add("--keep-rejected", action="store_true", help="also write removed documents, and why, to DIR/rejected")
    add("--memory", type=whole(1, 1 << 20), default=1024, metavar="MB", help="of each worker, for sorting (1024)")
    add_work(parser, max_bad_ratio=0.01)
    add_similarity(parser)
    return parser.parse_args()


def add_similarity(parser: Parser) -> None:
    """What counts as a duplicate, and what as benchmark text."""
    add = parser.add_argument_group("what is removed").add_argument
    add(
        "--threshold",
        type=float,
        default=0.8,
        metavar="J",
        help="Jaccard similarity of the sets of word n-grams from which documents are duplicates (0.8)",
    )
    add("--ngram", type=whole(), default=5, metavar="N", help="words in a shingle (5)")
    add("--bands", type=whole(), metavar="B", help="MinHash bands, with --rows (default: by the threshold)")
    add(
        "--rows",
        type=whole(),
        metavar="R",
        help="hash values in a band; more find fewer false candidates and miss more true ones",
    )
    add(
        "--keep",
        choices=get_args(Keep),
        default="first",
        help="of a cluster: the first in input order (default), or the one with most distinct n-grams",
    )
    add(
        "--decontaminate",
        nargs="+",
        action="gather",
        default=(),
        metavar="FILE",
        help="benchmark files: documents that contain a word n-gram of one of their records are removed",
    )
    add("--decontaminate-key", default="text", metavar="KEY", help="field of the benchmark records (text)")
    add("--decontaminate-ngram", type=whole(), default=13, metavar="N", help="words of a contaminating n-gram (13)")


@program
def main() -> None:
    options = parse()
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
