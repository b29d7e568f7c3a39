"""One page about one run or several, with its pictures as files beside it; viewable offline.

python tools/report.py runs/small --output reports/small
python tools/report.py runs/small runs/small-zero3 --output reports/comparison
"""

import argparse

from megalite.cli import Parser, file_path, program
from megalite.report.page import write_report
from megalite.report.run_directory import read_runs


def parse() -> argparse.Namespace:
    parser = Parser(__doc__, "Shows loss, speed, memory, where the time goes, and what happened; also of broken runs.")
    parser.add_argument(
        "runs", nargs="+", type=file_path, metavar="RUN_DIR", help="run directories; several are compared"
    )
    parser.add_argument(
        "--output", required=True, type=file_path, metavar="DIR", help="for report.html and its pictures"
    )
    return parser.parse_args()


@program
def main() -> None:
    options = parse()
    print(write_report(read_runs(list(options.runs)), options.output))


if __name__ == "__main__":
    main()
