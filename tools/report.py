"""One page about one run or several, with its pictures as files beside it; viewable offline.

python tools/report.py runs/small --output reports/small
python tools/report.py runs/small runs/small-zero3 --output reports/comparison
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megalite.errors import exit_on_user_error
from megalite.report.page import write_report
from megalite.report.run_directory import read_runs


@dataclass(frozen=True)
class Options:
    """Draw runs: loss, speed, memory, where the time goes, what happened. Interrupted runs are welcome."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR...")]
    """Run directories; several are compared."""
    output: Path
    """Directory for report.html and its pictures."""


@exit_on_user_error
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    print(write_report(read_runs(list(options.runs)), options.output))


if __name__ == "__main__":
    main()
