"""Which communication of a step starts where, and where it is waited for: as it is today, so that it gets better only
on purpose. One rank on the meta device, with layers of the width of real models, so that there are many buckets.

On NCCL the operations of a group run in the order of their starts; a wait stops the computation for all before it.
"""

import functools

import pytest

from megalite.parallel.zero import IN_FLIGHT
from megalite.schedule.ops import Op
from tests.parallel.test_meta_step import build, step
from tests.support.parity import Layout
from tests.support.recording import Start, Wait

WIDE = {
    "model.layers": 3,
    "model.hidden_size": 2048,
    "model.ffn_hidden_size": 4096,
    "model.heads": 16,
    "model.head_dim": 128,
    "model.vocab_size": 4096,
}
LAST = Op("B", 0, 3)


@functools.cache
def steps(layout, **fields):
    """A trainer and the events of its first and second step; all later ones are as the second."""
    trainer, recorder = build(layout, 0, WIDE | {f"model.{name}": value for name, value in fields.items()})
    return trainer, step(trainer, recorder), step(trainer, recorder)


def started(events, name):
    return [event for event in events if isinstance(event, Start) and event.name == name]


def waited(events, name):
    return [event for event in events if isinstance(event, Wait) and event.start.name == name]


def test_reductions_start_under_the_last_backward_from_the_second_step_on():
    """The first step counts how often weights report and reduces at its end. All waits are at the end of backward."""
    trainer, first, later = steps(Layout(data=2, zero=1))
    buckets = trainer.buckets[0].trained
    assert len(buckets) > 10
    assert {start.during for start in started(first, "reduce_scatter")} == {Op("R", 0, -1)}
    reductions = started(later, "reduce_scatter")
    assert [start.elements for start in reductions] == [bucket.length // 2 for bucket in buckets]
    assert {start.during for start in reductions} == {LAST}
    waits = waited(later, "reduce_scatter")
    assert [wait.start for wait in waits] == reductions and {wait.during for wait in waits} == {Op("R", 0, -1)}


def test_parameters_are_gathered_in_backward_order_and_waited_for_where_they_are_used():
    """Matrices in the next step's first forward pass; vectors, which are last in the queue, at once, so that they wait
    for all (the computation then does, too, at the count of tokens at the latest)."""
    trainer, _, later = steps(Layout(data=2, zero=1))
    *matrices, vectors = gathers = started(later, "all_gather")
    assert [start.elements for start in gathers] == [bucket.length for bucket in trainer.buckets[0].buckets]
    assert {start.during for start in gathers} == {None}
    *old, last = waited(later, "all_gather")
    assert last.start is vectors and last.during is None
    assert [wait.start.elements for wait in old] == [start.elements for start in reversed(matrices)]
    assert {wait.during for wait in old} == {Op("F", 0, 0)}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_begins_with_the_count_and_ends_with_one_message_to_all(zero):
    trainer, _, later = steps(Layout(data=2, zero=zero))
    count, wait = later[:2]
    assert isinstance(count, Start) and isinstance(wait, Wait) and wait.start is count
    assert (count.name, count.elements, count.during) == ("all_reduce", 1, None)
    sums = [start for start in started(later, "all_reduce") if start.during is None]
    assert [start.elements for start in sums] == [1, 5] and sums[1].group == trainer.mesh.world.ranks
    assert all(isinstance(start, Wait) or start.name == "all_gather" for start in later[later.index(sums[1]) + 3 :])


@pytest.mark.parametrize("zero", [2, 3])
def test_sharded_gradients_are_reduced_in_every_backward_with_few_on_their_way(zero):
    """The embedding's and the layers' of all four micro-batches; what is waited for is the oldest."""
    trainer, first, later = steps(Layout(data=2, zero=zero))
    sharded = [bucket for bucket in trainer.buckets[0].trained if bucket.decays]
    for events in (first, later):
        flying, most = [], 0
        for event in events:
            if isinstance(event, Start) and event.name == "reduce_scatter" and event.during.kind == "B":
                flying.append(event)
            elif isinstance(event, Wait) and event.start in flying:
                assert event.start is flying[0] or event.during.kind == "R"
                flying.remove(event.start)
            # vectors are reduced once, beside them
            most = max(most, sum(event.elements > 1 << 20 for event in flying))
        assert most == IN_FLIGHT + 1 and not flying
        for micro in range(4):
            there = [start for start in started(events, "reduce_scatter") if start.during == Op("B", 0, micro)]
            assert sum(start.elements > 1 << 20 for start in there) == len(sharded)


def test_the_next_layer_is_on_its_way_while_one_is_waited_for():
    """ZeRO-3, in all forward passes; the last layer's wait has none behind it."""
    _, _, later = steps(Layout(data=2, zero=3))
    for micro in range(4):
        op, flying, alone = Op("F", 0, micro), 0, 0
        for event in later:
            name = event.start.name if isinstance(event, Wait) else getattr(event, "name", "")
            if name == "all_gather":
                flying += 1 if isinstance(event, Start) else -1
                alone += isinstance(event, Wait) and event.during == op and flying == 0
        assert alone <= 2  # the last layer, and where the way turns: the first


def test_gradients_of_a_later_stage_are_reduced_while_earlier_ones_are_not_done():
    """Interleaved: their reductions start under the stage's own last backward. Today the computation waits for them at
    once, in the middle of the schedule."""
    layout = Layout(pipeline=2, schedule="interleaved", data=2, zero=1)
    _, _, later = steps(layout, layers=4)
    order = [(type(event), (event if isinstance(event, Start) else event.start).during) for event in later
             if isinstance(event, (Start, Wait))]  # fmt: skip
    early = [start for start in started(later, "reduce_scatter") if start.during == Op("B", 2, 3)]
    assert len(early) >= 4 and order.index((Start, Op("B", 2, 3))) < order.index((Start, LAST))
    waits = {wait.start: wait.during for wait in waited(later, "reduce_scatter")}
    assert {waits[start] for start in early} == {Op("R", 2, -1)}


def test_tied_ends_meet_once_and_then_reduce():
    layout = Layout(pipeline=2, data=2, zero=1)
    trainer, _, later = steps(layout, layers=4, tie_embeddings=True)
    sums = [start for start in started(later, "all_reduce") if start.during == Op("T", 0, -1)]
    assert [start.ranks for start in sums] == [trainer.mesh.group("pp").ranks]
    tied = [start for start in started(later, "reduce_scatter") if start.during == Op("R", 0, -1)]
    assert [start.elements for start in tied] == [sum(b.length for b in trainer.buckets[0].trained if b.deferred) // 2]
    assert later.index(tied[0]) > later.index(sums[0])
