"""Two forward passes that take turns: the same bits as one after the other, and collectives of one under the other."""

import contextlib
import contextvars
import functools
import threading

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from megalite.errors import UserError
from megalite.parallel.turns import Turns
from megalite.schedule.ops import Op
from megalite.schedule.schedules import build_schedule, forward_only, in_pairs
from tests.parallel.test_overlap import KEEPS, PLAIN, SPLITS, beside, events_of, trace, whole
from tests.spmd.test_virtual import CASES
from tests.support.parity import EVERYTHING, Case, Layout, assert_same_bits, train, train_virtually

fast = pytest.mark.fast
TWO = "parallel.two_batch_overlap"


def chain(turns, name, steps, seen):
    for step in range(steps):
        seen.append(f"{name}{step}")
        turns.give()
    return name


@fast
def test_turns_alternate_and_the_first_pass_leads_by_one():
    turns, seen = Turns(), []
    turns.give()  # outside, nothing happens
    pair = turns.run(*(functools.partial(chain, turns, name, 4, seen) for name in "ab"))
    assert pair == ("a", "b") and not turns.taken
    assert " ".join(seen) == "a0 a1 b0 a2 b1 a3 b2 b3"
    seen.clear()
    turns.run(functools.partial(chain, turns, "a", 0, seen), functools.partial(chain, turns, "b", 2, seen))
    assert seen == ["b0", "b1"]


@fast
@pytest.mark.parametrize("broken", ["first", "second", "second at its end"])
def test_a_failure_of_one_pass_ends_both(broken):
    turns, seen = Turns(), []

    def fail(steps):
        chain(turns, "x", steps, seen)
        raise ValueError(broken)

    passes = [functools.partial(chain, turns, "y", 5, seen), functools.partial(fail, 9 if "end" in broken else 2)]
    before = threading.active_count()
    with pytest.raises(ValueError, match=broken):
        turns.run(*(reversed(passes) if broken == "first" else passes))
    assert not turns.taken and threading.active_count() == before
    assert broken == "second at its end" or len(seen) < 7


@fast
def test_the_second_pass_has_the_modes_of_the_first():
    kind = contextvars.ContextVar("kind")
    kind.set("ours")

    def modes():
        return torch.is_grad_enabled(), kind.get()

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert Turns().run(modes, modes) == ((grad, "ours"),) * 2


@fast
def test_pairs_of_a_plan():
    def text(plan):
        return " ".join(f"{op.kind}{op.micro}" for op in plan[0])

    assert text(in_pairs(build_schedule("1f1b", 1, 5))) == "F0 F1 B0 B1 F2 F3 B2 B3 F4 B4"
    assert text(in_pairs(build_schedule("1f1b", 1, 1))) == "F0 B0"
    gpipe, validation = build_schedule("gpipe", 1, 4), forward_only((0,), 3)
    assert (in_pairs(gpipe), in_pairs(validation)) == (gpipe, validation)


ODD = {"train.global_batch_size": 6, "train.micro_batch_size": 2}
"""Three micro-batches: the last forward is alone."""
KINDS = {
    "tensor 2": (Layout(tensor=2, sequence=True), ODD),
    "whole activations": (Layout(tensor=2), {}),
    "four ranks, selective": (
        Layout(tensor=4, sequence=True),
        {"train.seq_length": 20, "train.recompute": "selective"},
    ),
    "full": (Layout(tensor=2, sequence=True), {"train.recompute": "full", SPLITS: 2}),
    # Of a plan in which forwards follow each other anyhow: ZeRO-2 sums what the loss has added to the output layer.
    "zero 2": (
        Layout(tensor=2, sequence=True, data=2, zero=2, schedule="gpipe"),
        {"train.global_batch_size": 8, KEEPS: True},
    ),
    "context": (Layout(tensor=2, sequence=True, context=2), {SPLITS: 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_at_once_train_the_same_as_one_after_the_other(kind):
    layout, fields = KINDS[kind]
    case = PLAIN.having(fields)
    assert_same_bits(train_virtually(case.having({TWO: True}), layout, chaos=True), whole(case, layout))


@pytest.mark.parametrize("name", ["experts", "lora", "log-probabilities"])
def test_other_layers_take_turns(name):
    layout = Layout(data=2, expert=2, tensor=2, sequence=True) if name == "experts" else Layout(tensor=2, sequence=True)
    case = CASES[name]
    assert_same_bits(train_virtually(case.having({TWO: True}), layout, chaos=True), whole(case, layout))


@fast
def test_gloo_runs_two_at_once(pool):
    layout = Layout(tensor=2, sequence=True)
    case = PLAIN.having({"train.global_batch_size": 8} | EVERYTHING)
    ours, theirs = train(pool, case.having({TWO: True}), layout, chaos=True), whole(case, layout)
    assert_same_bits(ours, theirs)


def watched(run):
    """`Turns.run` whose second pass is watched as the first one is: dispatch modes belong to a thread."""

    def run_watched(turns, first, second):
        modes = _get_current_dispatch_mode_stack()

        def again():
            with contextlib.ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(type(mode)(mode.recorder))
                return second()

        return run(turns, first, again)

    return run_watched


PAIR = {"train.micro_batch_size": 2, "train.global_batch_size": 4, TWO: True}


@fast
def test_every_collective_of_a_layer_is_beside_the_other_pass(monkeypatch):
    """`G` and `S` begin a gather and a sum, `w` waits for the pass's last one, and attention is two products."""
    monkeypatch.setattr(Turns, "run", watched(Turns.run))
    along, pair, layout = (0, 1), Op("F", 0, 0), Layout(tensor=2, sequence=True)
    two, four = (events_of(layout, 0, **PAIR, **{"model.layers": layers}) for layers in (2, 4))
    first, second = "wPPP" + "wG" + "PS" + "wP" + "wG" + "PS", "wP" + "wG" + "PS" + "wPPP" + "wG" + "PS"
    start, layer, end = trace(two, along, pair).partition(first + second)
    assert layer and trace(four, along, pair) == start + 3 * layer + end
    alone = [[start for start, products in beside(events, along, pair) if products == 0] for events in (two, four)]
    assert len(alone[0]) == len(alone[1])  # at both ends of a pass


@fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "two_batch_overlap = true hides what tensor or expert ranks send, and there are none"),
        ({"parallel.tensor": 2, "parallel.pipeline": 2}, "parallel.pipeline = 2 is not covered by"),
        ({"parallel.tensor": 2, "parallel.zero": 3}, "parallel.zero = 3 is not covered by"),
        (
            {"parallel.tensor": 2, "train.micro_batch_size": 2, "train.global_batch_size": 4},
            "needs two micro-batches of every step",
        ),
        ({"parallel.tensor": 2, "train.invariant": 2}, "train.invariant = 2 is not covered by"),
    ],
)
def test_what_is_not_covered_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Case.of(fields | {TWO: True}).config(4)
