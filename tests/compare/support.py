"""Sides of a comparison in the pool's workers, on made-up batches; with an error put into one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from megalite.compare.pieces import Piece, Sampling
from megalite.compare.record import Recorder
from megalite.compare.rounding import Rounding
from megalite.compare.verdict import Verdict, compare
from megalite.optim import lr_schedule
from megalite.train.trainer import Trainer
from tests.compare import errors
from tests.support.parity import Case, Layout, build_trainer, micro_batches
from tests.support.pool import Pool


@dataclass(frozen=True)
class Error:
    """The function of `tests.compare.errors` of this name: something is wrong while its context lasts."""

    name: str
    layer: int = 0

    def put_in(self, trainer: Trainer) -> contextlib.AbstractContextManager[None]:
        return getattr(errors, self.name)(trainer, self.layer)


def record_rank(
    rank: int, case: Case, world: int, rounding: Rounding | None, error: Error | None, sampling: Sampling
) -> list[Piece]:
    """One rank's recording of `case.steps` steps."""
    trainer = build_trainer(case.config(world), rank, world)
    config = trainer.config
    with error.put_in(trainer) if error else contextlib.nullcontext():
        recorder = Recorder(trainer, sampling, rounding)
        recorder.start()
        first = 0
        for step in range(1, case.steps + 1):
            samples = config.batch_size_at(first)
            batches: list[Any] = micro_batches(first, samples, config, trainer.mesh, case.documents)
            batches = errors.dealt(batches, trainer) if error and error.name == "wrong_samples" else batches
            if not (trainer.needs_batches or case.documents):
                batches = [None] * len(batches)
            lr = lr_schedule.learning_rate(step, config)
            with recorder.step(step, samples, lr) as finished:
                finished(trainer.step(batches, lr))
            first += samples
    return recorder.pieces


@dataclass(frozen=True)
class Run:
    """A side: what is trained, and how it is laid out."""

    case: Case
    layout: Layout = dataclasses.field(default_factory=Layout)

    @property
    def precision(self) -> str:
        return dict(self.case.fields)["train.precision"]

    def record(
        self,
        pool: Pool,
        rounding: Rounding | None = None,
        error: Error | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> list[Piece]:
        """The recording of all ranks."""
        case = self.case.having(self.layout.fields)
        args = (case, self.layout.world, rounding, error, sampling)
        return [piece for rank in pool.run(record_rank, self.layout.world, *args) for piece in rank]


@functools.lru_cache(maxsize=4)
def reference(
    pool: Pool,
    run: Run,
    coarser: str,
    weights: bool,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> tuple[list[Piece], list[list[Piece]]]:
    """Side A, and its noise."""
    noise = [run.record(pool, Rounding(seed, coarser, weights), None, sampling) for seed in (1, 2)]
    return run.record(pool, None, None, sampling), noise


def compare_pair(
    pool: Pool,
    a: Run,
    b: Run,
    error: Error | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> Verdict:
    """Side B, with `error` in it, against side A and its noise."""
    coarser = "bf16" if "bf16" in (a.precision, b.precision) else "fp32"
    same = a.precision == b.precision
    ours, noise = reference(pool, a, coarser, not same, sampling)
    return compare(ours, b.record(pool, None, error, sampling), noise, precision=coarser, same_precision=same)
