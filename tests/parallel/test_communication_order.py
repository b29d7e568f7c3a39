"""Which communication of a step starts where, and where it is waited for.

One rank on the meta device, with layers of the width of real models, so that there are many buckets.

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
    assert [wait.start for wait in waits] == reductions and {wait.during for wait in waits} == {None}


def at_once(bucket):
    return bucket.deferred or not bucket.decays


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        (Layout(data=2, zero=1), {}),
        (Layout(data=2, zero=2), {}),
        (Layout(pipeline=2, schedule="interleaved", data=2, zero=1), {"layers": 4}),
        (Layout(pipeline=2, schedule="zb_v", data=2, zero=1), {"layers": 4, "tie_embeddings": True}),
    ],
    ids=["zero 1", "zero 2", "interleaved", "tied"],
)
def test_parameters_are_gathered_in_the_order_of_their_use(layout, fields):
    """First the vectors of all stages, which are waited for at once when all is under way; then matrices as the next
    forward pass asks for them."""
    trainer, _, later = steps(layout, **fields)
    buckets = [bucket for stage in trainer.buckets.values() for bucket in stage.buckets]
    first = sum(map(at_once, buckets))
    gathers = started(later, "all_gather")
    assert len(gathers) == len(buckets) and {start.during for start in gathers} == {None}
    vectors, matrices = gathers[:first], gathers[first:]
    assert sorted(start.elements for start in vectors) == sorted(b.length for b in buckets if at_once(b))
    waits = [event for event in later if isinstance(event, Wait) and event.start in vectors]
    assert len(waits) == first and {wait.during for wait in waits} == {None}
    assert later.index(waits[0]) > later.index(matrices[-1])
    used = waited(later, "all_gather")[: len(matrices)]  # of the update before, whose order was the same
    assert {wait.during.kind for wait in used} == {"F"}
    assert [wait.start.elements for wait in used] == [start.elements for start in matrices]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_begins_with_the_count_and_ends_with_one_message_to_all(zero):
    """Both are messages to the world, and so do not queue behind the gathers of the update before."""
    trainer, _, later = steps(Layout(pipeline=2, data=2, zero=zero), layers=4)
    world = trainer.mesh.world.ranks
    assert trainer.mesh.data_group().ranks != world
    count = later[0]
    assert isinstance(count, Start) and (count.name, count.elements, count.group) == ("all_reduce", 1, world)
    sums = [start for start in started(later, "all_reduce") if start.during is None]
    assert [start.elements for start in sums] == [1, 5] and sums[1].group == world
    assert all(isinstance(start, Wait) or start.name == "all_gather" for start in later[later.index(sums[1]) + 3 :])


@pytest.mark.parametrize("rank", [0, 2], ids=["first stage", "last stage"])
def test_the_count_is_waited_for_where_the_loss_is_made(rank):
    """Other ranks need it for nothing, and wait when they have computed all."""
    trainer, recorder = build(Layout(pipeline=2, data=2, zero=1), rank, WIDE | {"model.layers": 4})
    for _ in range(2):
        later = step(trainer, recorder)
    (wait,) = [event for event in later if isinstance(event, Wait) and event.start is later[0]]
    assert wait.during == (Op("F", 1, 0) if rank == 2 else None)
    last_use = max(index for index, event in enumerate(later) if getattr(event, "during", None) is not None)
    assert (later.index(wait) < last_use) == (rank == 2)


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
                assert event.start is flying[0] or event.during is None
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


@pytest.mark.parametrize("zero", [0, 1])
def test_gradients_of_a_later_stage_are_reduced_under_the_backwards_of_earlier_ones(zero):
    """Interleaved: their reductions start under the stage's own last backward, and nothing waits for a reduction before
    the last operation is over."""
    name = "reduce_scatter" if zero else "all_reduce"
    _, _, later = steps(Layout(pipeline=2, schedule="interleaved", data=2, zero=zero), layers=4)
    large = [start for start in started(later, name) if start.elements > 1 << 16]
    early = [start for start in large if start.during == Op("B", 2, 3)]
    assert len(early) >= 4 and large.index(early[-1]) < min(large.index(s) for s in large if s.during == LAST)
    assert {wait.during for wait in waited(later, name) if wait.start in large} == {None}
    last = max(later.index(start) for start in started(later, "send") + started(later, "receive"))
    assert all(later.index(wait) > last for wait in waited(later, name) if wait.start in large)


def test_tied_ends_meet_once_and_then_reduce():
    layout = Layout(pipeline=2, data=2, zero=1)
    trainer, _, later = steps(layout, layers=4, tie_embeddings=True)
    sums = [start for start in started(later, "all_reduce") if start.during == Op("T", 0, -1)]
    assert [start.ranks for start in sums] == [trainer.mesh.group("pp").ranks]
    tied = [start for start in started(later, "reduce_scatter") if start.during == Op("R", 0, -1)]
    assert [start.elements for start in tied] == [sum(b.length for b in trainer.buckets[0].trained if b.deferred) // 2]
    assert later.index(tied[0]) > later.index(sums[0])
