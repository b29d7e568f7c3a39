"""A whole comparison: both sides and the noise recorded, one after the other, and judged."""

from __future__ import annotations

from pathlib import Path

from megalite.compare.pieces import Sampling
from megalite.compare.sides import Recordings, Side
from megalite.compare.verdict import Verdict, compare
from megalite.processes import Processes

_COARSEST_FIRST = ("fp8", "bf16", "fp32")


def compare_sides(
    recipe: Path, a: Side, b: Side, steps: int, noise_runs: int, sampling: Sampling, folder: Path
) -> Verdict:
    """Run side A, side A again with random rounding, and side B; recordings are left in `folder`.

    Raises `UserError` or `RunFailed`.
    """
    precision = min((a.precision, b.precision), key=_COARSEST_FIRST.index)
    same = a.config.train.precision == b.config.train.precision
    processes = Processes()
    with processes.listening():
        runs = Recordings(recipe, steps, sampling, folder, processes)
        ours = runs.record(a, "a")
        theirs = runs.record(b, "b")
        noise = [
            runs.record(a, f"noise_{seed}", {"seed": seed, "precision": precision, "weights": not same})
            for seed in range(1, noise_runs + 1)
        ]
    names = b.model is None
    return compare(ours, theirs, noise, precision=precision, same_precision=same, same_names=names)
