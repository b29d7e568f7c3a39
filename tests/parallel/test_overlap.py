"""Tensor-parallel communication in pieces: the same training, and every collective beside some product.

Equal bits: activations, losses and the gradients of matrices, for a row of a product does not depend on the others, and
weight gradients are single products over the whole sequence. The gradients of norms are sums over the tokens of each
rank, which has other tokens where the sequence is cut in another way: there the last bits differ.
"""

import dataclasses
import functools

import pytest
import torch

from megalite.errors import UserError
from megalite.parallel.collectives import TensorRegion
from megalite.schedule.ops import Op
from tests.parallel.test_meta_step import build, step
from tests.spmd.test_virtual import CASES
from tests.support.nccl import play
from tests.support.parity import (
    EVERYTHING,
    Case,
    Layout,
    assert_close,
    distance,
    train,
    train_alone,
    train_virtually,
)
from tests.support.recording import NotingProducts, Product, Start, Wait

fast = pytest.mark.fast
SPLITS, KEEPS = "parallel.tensor_overlap_splits", "parallel.keep_gathered"


class Alone:
    """The group of one rank of several; nothing is sent."""

    def __init__(self, size, index):
        self.size, self.index = size, index


@fast
@pytest.mark.parametrize(("rows", "pieces"), [(1, 2), (2, 3), (3, 2), (7, 3), (8, 4), (5, 4), (64, 4)])
def test_every_row_is_held_once_and_pieces_are_runs_of_the_sequence(rows, pieces):
    size = 3
    regions = [TensorRegion(Alone(size, index), True, pieces) for index in range(size)]
    whole, cut = torch.arange(rows * size), regions[0].cut(rows)
    assert len(cut) == min(pieces, rows)
    lengths = [piece.part.stop - piece.part.start for piece in cut]
    assert sum(lengths) == rows and max(lengths) - min(lengths) <= 1
    parts = [region.own(whole) for region in regions]
    for piece in cut:
        assert torch.equal(torch.cat([part[piece.part] for part in parts]), whole[piece.whole])
    assert TensorRegion(Alone(size, 0), False, pieces).pieces == TensorRegion(Alone(1, 0), True, pieces).pieces == 1


def assert_equal_but_for_norms(ours, theirs):
    assert ours.losses[0] == theirs.losses[0]
    for name, gradient in theirs.gradients.items():
        if "norm" not in name:
            assert torch.equal(ours.gradients[name], gradient), name
    norms = [name for name in theirs.gradients if "norm" in name]
    assert norms and all(distance(ours.gradients[name], theirs.gradients[name]) < 1e-6 for name in norms)
    assert_close(ours, theirs, relative=1e-6)


PLAIN = Case.of({"train.seq_length": 14, "train.micro_batch_size": 2, "train.global_batch_size": 4}, steps=4)
"""Seven tokens a rank, an odd number; an even number of sequences."""


@functools.cache
def whole(case, layout):
    return train_virtually(case, layout)


@fast
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_gloo_trains_the_same_in_pieces(pool, pieces):
    """Late and poisoned messages: what is read before it has come, or written while it is sent, shows."""
    layout = Layout(tensor=2, sequence=True)
    case = PLAIN.having({SPLITS: pieces} | EVERYTHING)
    ours, theirs = train(pool, case, layout, chaos=True), whole(case.having({SPLITS: 1}), layout)
    assert_equal_but_for_norms(ours, theirs)


KINDS = {
    "four ranks": (Layout(tensor=4, sequence=True), 3, {"train.seq_length": 20}),
    "selective": (Layout(tensor=2, sequence=True), 2, {"train.recompute": "selective"}),
    "full": (Layout(tensor=2, sequence=True), 4, {"train.recompute": "full"}),
    "later stage": (Layout(tensor=2, sequence=True, pipeline=2), 2, {}),
    "put off": (Layout(tensor=2, sequence=True, pipeline=2, schedule="zb_h1"), 2, {}),
    "zero 3": (Layout(tensor=2, sequence=True, data=2, zero=3), 3, {}),
    "context": (Layout(tensor=2, sequence=True, context=2), 2, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_backward_trains_the_same_in_pieces(kind):
    layout, pieces, fields = KINDS[kind]
    case = PLAIN.having(fields)
    assert_equal_but_for_norms(train_virtually(case.having({SPLITS: pieces}), layout), whole(case, layout))


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_inputs_are_those_gathered_again(kind, pieces):
    layout, _, fields = KINDS[kind]
    case = PLAIN.having(fields | {SPLITS: pieces})
    kept, again = train_virtually(case.having({KEEPS: True}), layout), whole(case, layout)
    assert kept.losses == again.losses
    assert all(torch.equal(kept.gradients[name], gradient) for name, gradient in again.gradients.items())


OTHERS = ("experts", "biased", "log-probabilities", "values", "lora", "norm of all heads")


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_know_which_tokens_a_rank_has(name):
    """Routers, adapters, heads of objectives: against one rank alone."""
    case, layout = CASES[name], Layout(tensor=2, sequence=True)
    pieces = case.having({SPLITS: 3, KEEPS: True})
    assert_close(train_virtually(pieces, layout), train_alone(case))


@pytest.mark.parametrize("block", ["Twice", "HalfFrozen"])
def test_weights_that_are_used_twice_or_stay(block):
    case = PLAIN.having({"model.feed_forward": f"tests.parallel.test_seams:{block}"})
    layout = Layout(tensor=2, sequence=True)
    assert_equal_but_for_norms(train_virtually(case.having({SPLITS: 2}), layout), whole(case, layout))


def events_of(layout, rank, **fields):
    """A rank's events of a step, products among them."""
    trainer, recorder = build(layout, rank, fields)
    step(trainer, recorder)
    with NotingProducts(recorder):
        return step(trainer, recorder)


def beside(events, along, operation):
    """[(start, number of products between its start and its wait)] of an operation's collectives in a group."""
    waits = {event.start: place for place, event in enumerate(events) if isinstance(event, Wait)}
    found = []
    for place, start in enumerate(events):
        if isinstance(start, Start) and start.group == along and start.during == operation:
            products = [event for event in events[place : waits[start]] if isinstance(event, Product)]
            found.append((start, len(products)))
    return found


def trace(events, along, op):
    """What an operation does on a group: `2G` starts of gathers in a row, `S` of a sum, `P` products, `w` waits."""
    letters = []
    for event in events:
        if getattr(event, "during", None) != op:
            continue
        if isinstance(event, Product):
            letters.append("P")
        elif isinstance(event, Start) and event.group == along:
            letters.append({"all_gather": "G", "reduce_scatter": "S"}.get(event.name, "?"))
        elif isinstance(event, Wait) and event.start.group == along:
            letters.append("w")
    return "".join(letters)


MIDDLE = {"model.layers": 3, "train.global_batch_size": 8}
"""Three stages of one layer: the middle one has neither embedding nor loss."""

ATTENTION_FORWARD, ATTENTION_BACKWARD = "PP", "PPPP"


@fast
def test_the_order_of_a_layer_in_two_pieces():
    """Forward: second gathers under first products, first sums under second products. Backward: every sum and gather
    has a product behind it before it is waited for."""
    layout = Layout(tensor=2, sequence=True, pipeline=3)
    events = events_of(layout, 2, **MIDDLE, **{SPLITS: 2})
    along, column, row = (2, 3), "GGwPwP", "PSPSww"
    assert trace(events, along, Op("F", 1, 1)) == column + ATTENTION_FORWARD + row + column + row
    down = "GG" + "wPwP"
    gate_up = "GG" + "PSPS" + "P" + "ww"  # the weight gradient of down before the waits
    out = "GG" + "wwP" + "wPwP"  # that of gate and up, whose input has come
    qkv = "PSPS" + "P" + "ww" + "wwP"  # that of out; its own at the end of the pass
    assert trace(events, along, Op("B", 1, 1)) == down + gate_up + out + "GG" + ATTENTION_BACKWARD + qkv


@fast
def test_what_is_kept_is_not_gathered_again():
    layout = Layout(tensor=2, sequence=True, pipeline=3)
    events = events_of(layout, 2, **MIDDLE, **{SPLITS: 2, KEEPS: True})
    gradient, summed = "GG" + "{}" + "wPwP", "PSPS" + "P" + "ww"
    feed_forward = gradient.format("") + summed
    attention = gradient.format("P") + ATTENTION_BACKWARD + summed + "P"
    assert trace(events, (2, 3), Op("B", 1, 1)) == feed_forward + attention


@fast
@pytest.mark.parametrize(("pieces", "recompute"), [(2, "none"), (3, "selective")])
def test_no_backward_collective_of_a_layer_stands_alone(pieces, recompute):
    """Of those of a stage with two layers, the first gather alone has nothing beside it: the pass has only begun."""
    layout, operation = Layout(tensor=2, sequence=True, pipeline=3), Op("B", 1, 1)
    fields = MIDDLE | {"model.layers": 6, "train.recompute": recompute, SPLITS: pieces}
    found = beside(events_of(layout, 2, **fields), (2, 3), operation)
    assert len(found) == 2 * 6 * pieces
    assert [products == 0 for _, products in found] == [True] + [False] * (len(found) - 1)


@fast
def test_nccl_runs_the_pieces_of_all_ranks_to_the_end():
    layout, fields = Layout(tensor=2, sequence=True, pipeline=2), {"model.layers": 2, "train.global_batch_size": 4}
    ranks = [events_of(layout, rank, **fields, **{SPLITS: 3}) for rank in range(layout.world)]
    for one_communicator in (False, True):
        play(ranks, 1, one_communicator=one_communicator)


@fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({SPLITS: 2}, "parallel.tensor_overlap_splits = 2 cuts what parallel.sequence sends, and that is off"),
        ({KEEPS: True}, "parallel.keep_gathered = true keeps what parallel.sequence gathers, and that is off"),
        ({SPLITS: 4, "parallel.tensor": 4, "train.seq_length": 12}, "= 4 exceeds the 3 tokens of a sequence"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Case.of(fields).config(int(fields.get("parallel.tensor", 1)))


@fast
def test_the_default_is_whole_on_cpus_and_two_pieces_on_gpus():
    parallel = Case.of({"parallel.tensor": 2}).config(2).parallel
    assert (parallel.overlap_splits(gpu=False), parallel.overlap_splits(gpu=True)) == (1, 2)
    assert dataclasses.replace(parallel, tensor_overlap_splits=4).overlap_splits(gpu=False) == 4
    assert dataclasses.replace(parallel, sequence=False).overlap_splits(gpu=True) == 1
