"""Lowering: every transfer has its other end in the same order, collectives stand where they must, no deadlock."""

import itertools
import random
import time
from collections import defaultdict

import pytest

from megalite.schedule.lowering import lower
from megalite.schedule.ops import (
    RECEIVES,
    SENDS,
    Op,
    ScheduleError,
    compute_ops,
    counterpart,
    parse_plan,
    stage_owners,
)
from megalite.schedule.schedules import SCHEDULES, build_schedule, forward_only
from megalite.schedule.simulate import check_deadlock

pytestmark = pytest.mark.fast


def every_plan(most_ranks=8, most_micro_batches=16):
    for name, schedule in SCHEDULES.items():
        for ranks in range(1, most_ranks + 1):
            for micro_batches in range(1, most_micro_batches + 1):
                for chunks in (2, 3) if schedule.interleaves else (schedule.chunks,):
                    if not schedule.interleaves or micro_batches % ranks == 0:
                        yield build_schedule(name, ranks, micro_batches, chunks)


def between(lowered, rank, other, owner):
    """The transfers between two ranks as `rank` lists them, each written as its sending end."""
    last = len(owner) - 1
    transfers = (op for op in lowered[rank] if op.kind in SENDS | RECEIVES)
    ends = ((op, counterpart(op, last)) for op in transfers)
    return [op if op.kind in SENDS else match for op, match in ends if owner[match.stage] == other]


def test_all_plans_up_to_8_ranks_and_16_micro_batches_cannot_deadlock():
    count = 0
    for plan in every_plan():
        for tied in (False, True):
            lowered = lower(plan, tied=tied)
            check_deadlock(lowered)
            assert compute_ops(lowered) == plan
            count += 1
    assert count > 500


def test_both_ends_of_every_pair_list_their_transfers_in_the_same_order():
    for plan in every_plan(6, 8):
        lowered, owner = lower(plan), stage_owners(plan)
        for rank in range(len(plan)):
            for other in range(rank):
                assert between(lowered, rank, other, owner) == between(lowered, other, rank, owner)


def test_exactly_the_values_that_cross_ranks_are_transferred():
    """2 ranks x 2 chunks: stages 0 and 2 on rank 0, 1 and 3 on rank 1, so all three borders cross."""
    lowered = lower(build_schedule("interleaved", 2, 4, 2))
    sends = sorted(op for ops in lowered for op in ops if op.kind in SENDS)
    expected = [Op("SB", stage, micro) for stage in (1, 2, 3) for micro in range(4)]
    expected += [Op("SF", stage, micro) for stage in (0, 1, 2) for micro in range(4)]
    assert sends == expected
    one_rank = lower(build_schedule("interleaved", 1, 4, 2))
    assert not [op for op in one_rank[0] if op.kind in SENDS | RECEIVES]


def test_sends_follow_their_compute_at_once():
    for plan in every_plan(8, 16):
        for ops in lower(plan):
            for before, op in itertools.pairwise(ops):
                if op.kind in SENDS:
                    following = [Op({"F": "SF", "B": "SB", "I": "SB"}[before.kind], before.stage, before.micro)]
                    assert [op] == following


def test_receives_are_posted_ahead_of_use_but_not_all_at_once():
    """At least one operation of the receiver overlaps a forward transfer in full flow; waiting buffers stay few."""
    for name, chunks, most in [("gpipe", 1, 2), ("1f1b", 1, 2), ("interleaved", 2, 8)]:
        for rank, ops in enumerate(lower(build_schedule(name, 4, 16, chunks))):
            waiting = peak = 0
            for op in ops:
                if op.kind in RECEIVES:
                    waiting += 1
                elif (op.kind == "F" and op.stage > 0) or (op.kind == "B" and op.stage < 4 * chunks - 1):
                    waiting -= 1
                assert waiting >= 0
                peak = max(peak, waiting)
            assert peak <= most, (name, rank)
            assert peak >= 2 or rank == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 3)])
def test_collectives_come_after_the_last_backward(name, chunks, tied):
    ranks, micro_batches = 4, 8
    lowered = lower(build_schedule(name, ranks, micro_batches, chunks), tied=tied)
    last_stage = ranks * chunks - 1
    for rank, ops in enumerate(lowered):
        place = {op: index for index, op in enumerate(ops)}
        for stage in range(rank, last_stage + 1, ranks):
            assert place[Op("R", stage, -1)] > place[Op("B", stage, micro_batches - 1)]
        ties = [op for op in ops if op.kind == "T"]
        expected = {0: [Op("T", 0, -1)], ranks - 1: [Op("T", last_stage, -1)]}
        assert ties == (expected.get(rank, []) if tied else [])
        for tie in ties:
            assert place[Op("B", tie.stage, micro_batches - 1)] < place[tie] < place[Op("R", tie.stage, -1)]
            assert place[tie] > max(index for op, index in place.items() if op.kind in SENDS | RECEIVES)


def test_reduction_starts_while_the_rank_still_has_backwards():
    """Interleaved: a rank's later stages are done first, and their gradients travel while it works on."""
    ops = lower(build_schedule("interleaved", 4, 8, 2))[1]
    assert ops.index(Op("R", 5, -1)) < ops.index(Op("B", 1, 7))


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (1, 2)])
def test_tied_embeddings_on_one_rank_are_summed_once(ranks, chunks):
    plan = build_schedule("interleaved" if chunks > 1 else "1f1b", ranks, 2, chunks)
    lowered = lower(plan, tied=True)
    assert [str(op) for op in lowered[0] if op.kind == "T"] == ["0T"]
    assert {str(op) for op in lowered[0][lowered[0].index(Op("T", 0, -1)) + 1 :]} == {
        f"{stage}R" for stage in {0, chunks - 1}
    }
    check_deadlock(lowered)


def test_split_backward_sends_after_the_input_gradient_and_reduces_after_the_weights():
    plan = parse_plan("0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1")
    lowered = lower(plan, tied=True)
    check_deadlock(lowered)
    second = [str(op) for op in lowered[1]]
    assert second.index("1SB0") == second.index("1I0") + 1
    assert second[-3:] == ["1W1", "1T", "1R"]


def test_stages_may_turn_round_on_a_rank():
    """V-shaped placement: rank 0 holds stages 0 and 3, rank 1 holds 1 and 2, whose border needs no transfer."""
    lowered = lower(parse_plan("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0"), tied=True)
    check_deadlock(lowered)
    assert not {Op("SF", 1, 0), Op("RF", 2, 0), Op("SB", 2, 0)} & {op for ops in lowered for op in ops}
    assert [str(op) for op in lowered[0]][-3:] == ["0T", "0R", "3R"]


def test_forward_only_plans_lower_without_collectives():
    for owners, micro_batches in [([0], 3), ([0, 1, 2, 3] * 2, 6), ([0, 1, 2], 7), ([0, 1, 2, 2, 1, 0], 3)]:
        lowered = lower(forward_only(owners, micro_batches), tied=True)
        check_deadlock(lowered)
        assert {op.kind for ops in lowered for op in ops} <= {"F", "SF", "RF"}


def test_random_legal_orders_lower_without_deadlock():
    """Not only the shipped schedules: any order that can run at all is lowered safely."""
    for seed in range(200):
        chance = random.Random(seed)
        ranks, chunks, micro_batches = chance.randint(1, 5), chance.randint(1, 3), chance.randint(1, 6)
        owner = [chance.randrange(ranks) for _ in range(ranks * chunks)]
        waiting = defaultdict(list)
        left = {(stage, micro): ["F", *chance.choice([["B"], ["I", "W"]])] for stage in range(len(owner))
                for micro in range(micro_batches)}  # fmt: skip
        done = set()
        while left:
            (stage, micro), kinds = chance.choice(sorted(left.items()))
            before = ("F", stage - 1) if kinds[0] == "F" else ("G", stage + 1)
            if kinds[0] == "W" or not 0 <= before[1] < len(owner) or (*before, micro) in done:
                waiting[owner[stage]].append(Op(kinds[0], stage, micro))
                done.add(("F" if kinds.pop(0) == "F" else "G", stage, micro))
                if not kinds:
                    del left[stage, micro]
        lowered = lower(tuple(tuple(waiting[rank]) for rank in range(ranks)), tied=bool(seed % 2))
        check_deadlock(lowered)


def test_plan_for_16_ranks_8_chunks_128_micro_batches_takes_seconds():
    """The pipeline of a 16,384-rank job (tensor 8 x pipeline 16 x data 128), all schedules; linear, not quadratic."""
    began = time.process_time()
    for name, schedule in SCHEDULES.items():
        chunks = 8 if schedule.interleaves else schedule.chunks
        check_deadlock(lower(build_schedule(name, 16, 128, chunks), tied=True))
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n0F1,0B1", "stage 0 is on rank 0 and on rank 1"),
        ("0F0,0B0\n2F0,2B0", r"stages are \[0, 2\]"),
        ("0F0,0F0,0B0", "rank 0 runs 0F0 twice"),
        ("0F0,0B0\n1B0,1F0", "rank 0 waits at 0B0, rank 1 waits at 1B0"),
        ("0F0,0B0\n1F1,1B1", "rank 1 waits at 1F1"),
        ("", "stages are"),
    ],
)
def test_what_is_no_schedule_is_refused_by_rank_and_operation(text, message):
    with pytest.raises(ScheduleError, match=message):
        lower(parse_plan(text))
