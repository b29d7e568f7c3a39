"""One page about one run or several, with its pictures as files beside it; viewable offline.

python tools/report.py runs/small --output reports/small
python tools/report.py runs/small runs/small-zero3 --output reports/comparison
python tools/report.py --scores scores.jsonl --output reports/scores      # what tools/evaluate.py printed
"""

import argparse

from megalite.cli import Parser, file_path, program
from megalite.errors import UserError
from megalite.report.page import write_report
from megalite.report.run_directory import read_runs
from megalite.report.scores import read_scores


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "Shows loss, speed, memory, where the time goes, and what happened; also of broken runs.")
    parser.add_argument(
        "runs", nargs="*", type=file_path, metavar="RUN_DIR", help="run directories; several are compared"
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        action="gather",
        type=file_path,
        default=(),
        metavar="FILE",
        help="lines printed by tools/evaluate.py, of any number of checkpoints",
    )
    parser.add_argument(
        "--output", required=True, type=file_path, metavar="DIR", help="for report.html and its pictures"
    )
    options = parser.parse_args()
    if not options.runs and not options.scores:
        raise UserError("name a run directory, or a file of scores with --scores")
    return options


@program
def main() -> None:
    options = parse()
    print(write_report(read_runs(list(options.runs)), options.output, read_scores(options.scores)))


if __name__ == "__main__":
    main()
