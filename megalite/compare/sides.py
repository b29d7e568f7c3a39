"""The two sides of a comparison: what is asked for, and the processes that record it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.affinity import own_cores
from megalite.compare.pieces import Piece, Sampling, read_pieces
from megalite.config import Config, check, load_config
from megalite.errors import FINISHED, INTERRUPTED, UNUSABLE, RunFailed, UserError
from megalite.processes import GPU_ENVIRONMENT, Processes, outcome, run_ranks
from megalite.train.inputs import check_inputs

WORKER = Path(__file__).with_name("worker.py")
HUGGINGFACE = "hf:"
_NEEDED = ("megalite/__init__.py", "kernels/__init__.py", "megalite/data/_index.*.so")


@dataclass(frozen=True)
class Side:
    """One side: overrides of the recipe, processes, and perhaps another checkout, or a Hugging Face directory.

    `letter` is `a` or `b`, for messages.
    """

    letter: str
    overrides: tuple[str, ...] = ()
    processes: int = 1
    tree: Path | None = None
    model: Path | None = None
    config: Config = field(default_factory=Config)

    @property
    def precision(self) -> str:
        """`fp8`, `bf16` or `fp32`: what its activations are rounded to."""
        return "fp8" if self.config.train.fp8 != "none" and self.model is None else self.config.train.precision


def read_side(letter: str, recipe: Path, text: str, processes: int | None, tree: Path | None) -> Side:
    """A side from the command line, its configuration and data checked. Raises `UserError`."""
    model = None
    if text.startswith(HUGGINGFACE):
        folder, _, text = text.removeprefix(HUGGINGFACE).partition(" ")
        model = Path(folder)
        if not (model / "config.json").is_file():
            raise UserError(f"--{letter} {HUGGINGFACE}{folder}: no config.json is there; name a Hugging Face directory")
    try:
        overrides = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--{letter} {text!r} cannot be read ({error}); quote it as a shell would") from None
    config = load_config(recipe, overrides)
    if config.objective.data_format == "prompt":
        raise UserError(
            f"objective.kind = {config.objective.kind}: its batches are written by the model during a step, so two "
            "runs have no batch in common; compare them with objective.kind = sft on the same data"
        )
    if tree is not None:
        _check_tree(letter, tree)
    count = processes or (1 if model else config.model_parallel)
    if model is not None and count != 1:
        raise UserError(f"--{letter}-processes {count}: a Hugging Face model runs in one process")
    if tree is None:
        check_inputs(config, count, count_parameters=False)
    else:
        check(config, count)
    return Side(letter, overrides, count, tree, model, config)


def _check_tree(letter: str, tree: Path) -> None:
    for pattern in _NEEDED:
        if not any(tree.glob(pattern)):
            remedy = "run `python setup.py build_ext --inplace` in it" if pattern.endswith(".so") else "name a checkout"
            raise UserError(f"--{letter}-tree {tree}: it has no {pattern.replace('.*', '')}; {remedy}")


def check_alike(a: Side, b: Side) -> None:
    """Refuse sides that do not take the same global batch. Raises `UserError`."""
    for name, read in _SAME.items():
        if read(a.config) != read(b.config):
            raise UserError(
                f"{name} is {read(a.config)} in a and {read(b.config)} in b: the sides have no batch in common; "
                "set it alike in both"
            )


_SAME: dict[str, Callable[[Config], Any]] = {
    "train.global_batch_size": lambda config: config.train.global_batch_size,
    "train.batch_ramp": lambda config: config.train.batch_ramp,
    "train.seq_length": lambda config: config.train.seq_length,
}


class Recordings:
    """Runs sides, each into a folder of its own below `folder`; used within `Processes.listening`."""

    def __init__(self, recipe: Path, steps: int, sampling: Sampling, folder: Path, processes: Processes) -> None:
        self.recipe, self.steps, self.sampling = recipe, steps, sampling
        self.folder, self.processes = folder, processes

    def record(self, side: Side, name: str, rounding: dict[str, Any] | None = None) -> list[Piece]:
        """All ranks' pieces of one run. Raises `UserError` or `RunFailed`."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        order = {
            "folder": str(folder.resolve()),
            "recipe": str(self.recipe),
            "overrides": side.overrides,
            "steps": self.steps,
            "sampling": dataclasses.asdict(self.sampling),
            "rounding": rounding,
            "tree": str(side.tree.resolve()) if side.tree else "",
            "model": str(side.model) if side.model else "",
        }
        path = folder / "order.json"
        path.write_text(json.dumps(order))
        program = WORKER.with_name("huggingface.py") if side.model else WORKER
        threads = {"OMP_NUM_THREADS": str(max(1, len(own_cores()) // side.processes))}
        environment = {**threads, **GPU_ENVIRONMENT, **os.environ}
        command = [sys.executable, "-P", str(program), str(path)]
        ends = run_ranks(self.processes, command, side.processes, environment, folder)
        code = outcome([code for _, code in ends], self.processes.requests)
        if code == INTERRUPTED or self.processes.requests:
            raise KeyboardInterrupt
        refusals = sorted(folder.glob("refused_*"))
        if code == UNUSABLE and refusals:
            raise UserError(f"side {side.letter}: {refusals[0].read_text()}")
        if code != FINISHED:
            why = refusals[0].read_text() if refusals else self._last_words(folder)
            raise RunFailed(f"side {side.letter} failed: {why}")
        return list(self._read(folder, side.processes))

    def _last_words(self, folder: Path) -> str:
        """The line of an error in a rank's output."""
        for path in sorted(folder.glob("output_*.log")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            if lines:
                return f"{lines[-1].removeprefix('error: ')} (see {path})"
        return f"a rank ended without a word; see {folder}"

    @staticmethod
    def _read(folder: Path, processes: int) -> Iterator[Piece]:
        for rank in range(processes):
            yield from read_pieces(folder / f"rank_{rank:05d}")
