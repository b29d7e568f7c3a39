"""Compare two runs of the same global batch and name the first tensor that differs.

python tools/compare.py recipe.toml --a "" --b "--parallel.tensor 2"
python tools/compare.py recipe.toml --a "--kernels.default reference" --b "" --steps 3 --output page
python tools/compare.py recipe.toml --a "" --b "" --b-tree ../megalite-before      # another checkout
python tools/compare.py recipe.toml --a "" --b hf:models/llama                     # a Hugging Face model

Activations, gradients, the optimizer's state and weights are put together from all ranks and compared in the order of
execution. What rounding alone can do is measured by running side A again with every tensor rounded at random. Prints
one JSON line. Exit code 0: equal, 1: a tensor differs, 2: the sides cannot be compared, 3: a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megalite.cli import Parser, file_path, program, whole
from megalite.compare.pieces import Sampling
from megalite.compare.run import compare_sides
from megalite.compare.sides import Side, check_alike, read_side
from megalite.errors import RunFailed, UserError, fail

DIFFERENT, FAILED = 1, 3


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("recipe", type=file_path, metavar="RECIPE", help="a TOML file; both sides begin with it")
    for letter in ("a", "b"):
        add(
            f"--{letter}",
            required=True,
            metavar="OVERRIDES",
            help=f"side {letter}: overrides in one word, as a shell would take them"
            + ("; hf:DIR before them is a Hugging Face model" if letter == "b" else ""),
        )
        add(f"--{letter}-processes", type=whole(), metavar="N", help="its ranks (default: those of one model)")
    add("--b-tree", type=file_path, metavar="DIR", help="side b runs the megalite of this checkout")
    add("--steps", type=whole(1, 1000), metavar="K", help="optimizer steps (2; 1 with hf:)")
    add("--noise-runs", type=whole(1, 100), default=2, metavar="N", help="runs of side a rounded at random (2)")
    add(
        "--sample",
        type=whole(0),
        default=0,
        metavar="N",
        help="keep at most N elements of each tensor, and a hash of all of them (0: keep all)",
    )
    add("--output", type=file_path, metavar="DIR", help="for compare.html and its picture")
    add("--keep", type=file_path, metavar="DIR", help="leave the recordings in this new directory")
    return parser.parse_args()


def read_sides(options: argparse.Namespace) -> tuple[Side, Side]:
    """Both sides, checked alone and together."""
    a = read_side("a", options.recipe, options.a, options.a_processes, None)
    if a.model is not None:
        raise UserError("--a hf:…: a Hugging Face model can be side b alone; exchange --a and --b")
    if options.b.startswith("hf:") and not a.config.checkpoint.load:
        folder = options.b.removeprefix("hf:").partition(" ")[0]
        a = read_side("a", options.recipe, f"{options.a} --checkpoint.load {folder}", options.a_processes, None)
    b = read_side("b", options.recipe, options.b, options.b_processes, options.b_tree)
    check_alike(a, b)
    if b.model is not None and (options.steps or 1) > 1:
        raise UserError(f"--steps {options.steps}: a Hugging Face model is compared in one step, before its update")
    return a, b


@contextlib.contextmanager
def recordings(keep: Path | None) -> Iterator[Path]:
    """A folder for the recordings: temporary, or `keep`, which must be new."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="megalite-compare-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--keep {keep} cannot be made ({error.strerror}); name a new directory") from None
    yield keep


@program
def main() -> int:
    options = parse()
    a, b = read_sides(options)
    steps = options.steps or (1 if b.model is not None else 2)
    sampling = Sampling(options.sample, hashed=options.sample > 0)
    try:
        with recordings(options.keep) as folder:
            verdict = compare_sides(options.recipe, a, b, steps, options.noise_runs, sampling, folder)
    except RunFailed as error:
        fail(str(error), FAILED)
    summary = verdict.summary()
    if options.output is not None:
        from megalite.compare.compare_page import write_page  # loads matplotlib

        summary["page"] = str(write_page(verdict, a, b, options.output))
    print(json.dumps(summary, ensure_ascii=False))
    return 0 if summary["equal"] else DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
