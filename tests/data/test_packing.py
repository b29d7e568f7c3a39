"""The packing plan: every example once, nothing too long, a pure function, and rows that are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.packing import ExampleOrder, best_fit, plan_rows

pytestmark = pytest.mark.fast


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    room=st.integers(50, 130),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
    packing=st.booleans(),
)
def test_an_epoch_holds_every_example_once_in_rows_that_have_room(lengths, room, seed, epoch, packing):
    lengths = np.array(lengths)
    order = ExampleOrder([lengths.size], None, seed)
    plan = plan_rows(order, lengths, room, epoch, packing)
    assert sorted(plan.members.tolist()) == list(range(lengths.size))
    rows = [plan.members[start:stop] for start, stop in zip(plan.starts, plan.starts[1:])]
    assert all(len(row) > 0 and lengths[row].sum() <= room for row in rows)
    assert packing or all(len(row) == 1 for row in rows)
    again = plan_rows(ExampleOrder([lengths.size], None, seed), lengths, room, epoch, packing)
    assert np.array_equal(plan.members, again.members) and np.array_equal(plan.starts, again.starts)
    if packing:  # two rows that would fit into one are left open at most once
        assert sum(lengths[row].sum() * 2 <= room for row in rows) <= 1


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_weights_share_out_the_examples_and_no_file_repeats_one_before_all_were_taken(counts, weights, seed):
    shares = np.array(weights[: len(counts)])
    shares = (shares / shares.sum()).tolist()
    order = ExampleOrder(counts, shares, seed)
    epochs = [order.members(epoch) for epoch in range(4)]
    assert all(members.size == order.total for members in epochs)
    drawn = np.concatenate(epochs)
    for file, count in enumerate(counts):
        own = drawn[(drawn >= order.first[file]) & (drawn < order.first[file + 1])]
        assert abs(own.size - shares[file] * drawn.size) <= len(counts)
        taken = np.bincount(own - order.first[file], minlength=count)
        assert taken.max() - taken.min() <= 1


def test_epochs_and_seeds_differ_and_the_order_stays_random(chance_seed):
    lengths = np.random.default_rng(chance_seed).integers(5, 400, 2000)
    order = ExampleOrder([2000], None, chance_seed)
    assert not np.array_equal(order.members(0), order.members(1))
    plans = [plan_rows(order, lengths, 1024, epoch) for epoch in range(2)]
    assert not np.array_equal(plans[0].members[:50], plans[1].members[:50])
    assert not np.array_equal(
        plans[0].members[:50], plan_rows(ExampleOrder([2000], None, chance_seed + 1), lengths, 1024, 0).members[:50]
    )
    for plan in plans:
        assert lengths.sum() / (len(plan) * 1024) > 0.97
        # neither numbers nor lengths drift along the epoch
        halves = np.array_split(plan.members, 2)
        assert abs(halves[0].mean() - halves[1].mean()) < 200
        assert abs(lengths[halves[0]].mean() - lengths[halves[1]].mean()) < 30


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([6, 5, 4, 4, 3], 10) == [[0, 2], [1, 3], [4]]
    assert best_fit([6, 5, 5, 4], 10, open_rows=1) == [[0], [1, 2], [3]]


@pytest.fixture
def chance_seed() -> int:
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return seed
