"""Runs that differ in layout, kernels or precision alone: no tensor differs beyond the noise. And recording changes
nothing of a run."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from megalite.compare.pieces import Sampling
from megalite.compare.record import Recorder
from tests.compare.support import Run, compare_pair
from tests.support.parity import EVERYTHING, Case, Layout, build_trainer, micro_batches

SPARSE = {
    "model.experts": 6,
    "model.experts_per_token": 2,
    "model.expert_ffn_hidden_size": 12,
    "model.aux_loss": 0.02,
    "model.router_z_loss": 0.003,
}
SEED = {"run.seed": random.SystemRandom().randrange(10**6)}
PLAIN, ODD = Run(Case.of(SEED, steps=2)), Run(Case.of(EVERYTHING | SEED, steps=2, documents=True))
WIDE = Run(Case.of({"model.layers": 5} | SEED, steps=2))


def laid(run: Run, **fields: object) -> Run:
    return dataclasses.replace(run, layout=Layout(**fields))  # type: ignore[arg-type]


def having(run: Run, **fields: object) -> Run:
    """With other fields, written section__name."""
    return dataclasses.replace(
        run, case=run.case.having({name.replace("__", "."): value for name, value in fields.items()})
    )


PAIRS = {
    "tensor": (PLAIN, laid(PLAIN, tensor=2)),
    "tensor 4, heads shared": (PLAIN, laid(PLAIN, tensor=4)),
    "sequence": (PLAIN, laid(PLAIN, tensor=2, sequence=True)),
    "pieces": (
        PLAIN,
        having(laid(PLAIN, context=2, tensor=2, sequence=True), parallel__tensor_overlap_splits=2),
    ),
    "pipeline": (PLAIN, laid(PLAIN, pipeline=2)),
    "interleaved": (WIDE, laid(WIDE, pipeline=2, schedule="interleaved")),
    "zero bubble": (WIDE, laid(WIDE, pipeline=2, schedule="zb_v")),
    "zero 0": (PLAIN, laid(PLAIN, data=4, zero=0)),
    "zero 2": (PLAIN, laid(PLAIN, data=2, zero=2)),
    "zero 3": (laid(PLAIN, data=2, zero=1), laid(PLAIN, data=4, zero=3)),
    "context": (PLAIN, laid(PLAIN, context=2)),
    "ring": (laid(PLAIN, tensor=2), laid(PLAIN, context=2, mode="ring", tensor=2, sequence=True)),
    "ulysses": (PLAIN, laid(PLAIN, context=3, mode="ulysses")),
    "everything": (ODD, laid(ODD, tensor=2, pipeline=2, sequence=True)),
    "recompute": (PLAIN, having(laid(PLAIN, tensor=2), train__recompute="full")),
    "recompute selective": (ODD, having(laid(ODD, tensor=2, data=2), train__recompute="selective")),
    "kernels": (PLAIN, having(PLAIN, kernels__default="reference")),
    "micro-batches": (PLAIN, having(laid(PLAIN, data=2), train__micro_batch_size=2)),
}
EXPERTS = Run(Case.of(SPARSE | SEED, steps=2))
EXPERT_PAIRS = {
    "experts": (EXPERTS, laid(EXPERTS, data=2, expert=2)),
    "experts, tensor": (EXPERTS, laid(EXPERTS, data=2, expert=2, tensor=2, sequence=True)),
}


def check(pool, a: Run, b: Run) -> None:
    verdict = compare_pair(pool, a, b)
    largest = max(verdict.measured, key=lambda each: each.ratio)
    print("largest ratio", round(largest.ratio, 3), largest.port.kind, largest.port.name)
    assert verdict.first is None, (SEED, verdict.first.summary())
    assert len(verdict.measured) > 250


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_clean_pair_is_equal(pool, name, precision):
    a, b = (having(run, train__precision=precision) for run in PAIRS[name])
    if precision == "bf16":
        a, b = (dataclasses.replace(run, case=dataclasses.replace(run.case, steps=1)) for run in (a, b))
    check(pool, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERT_PAIRS)
def test_a_clean_pair_with_experts_is_equal(pool, name):
    check(pool, *EXPERT_PAIRS[name])


@pytest.mark.slow
def test_two_precisions_are_equal(pool):
    check(pool, PLAIN, having(laid(PLAIN, tensor=2), train__precision="bf16"))


@pytest.mark.slow
def test_samples_and_hashes_say_the_same(pool):
    """A pipeline has the bits of one process; tensor ranks do not, but are equal."""
    sampling = Sampling(100, hashed=True)
    for layout, same in (({"pipeline": 2}, True), ({"tensor": 2}, False)):
        verdict = compare_pair(pool, PLAIN, laid(PLAIN, **layout), sampling=sampling)
        assert verdict.first is None
        assert all(each.same_bits for each in verdict.measured) == same


def train_rank(rank, run, recorded):
    world = run.layout.world
    trainer = build_trainer(run.case.having(run.layout.fields).config(world), rank, world)
    recorder = Recorder(trainer)
    if recorded:
        recorder.start()
    losses = []
    for step in (1, 2):
        batches = micro_batches(4 * (step - 1), 4, trainer.config, trainer.mesh, run.case.documents)
        if recorded:
            with recorder.step(step, 4, 1e-3) as finished:
                result = trainer.step(batches, 1e-3)
                finished(result)
        else:
            result = trainer.step(batches, 1e-3)
        losses.append((result.loss, result.grad_norm))
    return losses, [segment.master.detach().clone() for segment in trainer.segments]


@pytest.mark.parametrize("name", ["everything", "zero bubble", "recompute selective", "zero 3"])
def test_recording_changes_no_bit_of_a_run(pool, name):
    run = PAIRS[name][1]
    plain, recorded = (pool.run(train_rank, run.layout.world, run, flag) for flag in (False, True))
    for (losses, weights), (others, there) in zip(plain, recorded, strict=True):
        assert losses == others
        assert all(map(torch.equal, weights, there))
