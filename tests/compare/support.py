"""Sides of a comparison in the pool's workers, on made-up batches; with an error put into one of them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from megalite.compare.pieces import Piece, Sampling
from megalite.compare.record import Recorder
from megalite.compare.rounding import Rounding
from megalite.compare.verdict import Verdict, compare
from tests.support.parity import Case, Layout, build_trainer, micro_batches
from tests.support.pool import Pool

Error = Callable[[Any, int], AbstractContextManager[None]]
"""(trainer, rank) -> a context in which something is wrong."""


def record_rank(
    rank: int,
    case: Case,
    world: int,
    rounding: Rounding | None = None,
    error: Error | None = None,
    sampling: Sampling | None = None,
) -> list[Piece]:
    """One rank's recording of `case.steps` steps."""
    with contextlib.ExitStack() as stack:
        config = case.config(world)
        if error is not None and getattr(error, "early", False):
            stack.enter_context(error(None, rank))
        trainer = build_trainer(config, rank, world)
        if error is not None and not getattr(error, "early", False):
            stack.enter_context(error(trainer, rank))
        recorder = Recorder(trainer, sampling, rounding)
        recorder.start()
        first, rate = 0, importlib.import_module("megalite.optim.lr_schedule")
        for step in range(1, case.steps + 1):
            samples = config.batch_size_at(first)
            batches: list[Any] = micro_batches(first, samples, config, trainer.mesh, case.documents)
            if not (trainer.needs_batches or case.documents):
                batches = [None] * len(batches)
            lr = rate.learning_rate(step, config)
            with recorder.step(step, samples, lr) as finished:
                finished(trainer.step(batches, lr))
            first += samples
    return recorder.pieces


def record(
    pool: Pool, case: Case, layout: Layout, rounding: Rounding | None = None, error: Error | None = None, **options: Any
) -> list[Piece]:
    """The recording of all ranks."""
    case = case.having(layout.fields)
    case.config(layout.world)
    args = (case, layout.world, rounding, error)
    if layout.world == 1 and error is None:
        return record_rank(0, *args, **options)
    return [piece for rank in pool.run(record_rank, layout.world, *args) for piece in rank]


def compare_pair(
    pool: Pool, a: tuple[Case, Layout], b: tuple[Case, Layout], error: Error | None = None, runs: int = 2
) -> Verdict:
    """Side B, with `error` in it, against side A and its noise."""
    precisions = [dict(case.fields)["train.precision"] for case, _ in (a, b)]
    coarser = "bf16" if "bf16" in precisions else "fp32"
    same = precisions[0] == precisions[1]
    noise = [record(pool, *a, Rounding(seed, coarser, weights=not same)) for seed in range(runs)]
    return compare(record(pool, *a), record(pool, *b, None, error), noise, precision=coarser, same_precision=same)
