"""The simulator against theory, the deadlock check against plans broken on purpose, and the picture."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.schedule.draw import as_text, draw, headline
from megalite.schedule.lowering import lower
from megalite.schedule.ops import Op, ScheduleError, compute_ops, parse_plan
from megalite.schedule.schedules import build_schedule
from megalite.schedule.simulate import DeadlockError, check_deadlock, simulate

pytestmark = pytest.mark.fast

TOOL = Path(__file__).parents[2] / "tools" / "draw_schedule.py"


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_bubbles_equal_theory(ranks, backward):
    """(p-1)/(m+p-1) for GPipe and 1F1B, (p-1)/(v*m+p-1) interleaved, whatever a backward costs."""
    cost = {"F": 1.0, "B": backward}
    for micro_batches in range(ranks, 17, ranks):
        idle = (ranks - 1) / (micro_batches + ranks - 1)
        for name in ("gpipe", "1f1b"):
            assert simulate(build_schedule(name, ranks, micro_batches), cost).bubble == pytest.approx(idle)
        for chunks in (2, 3):
            plan = build_schedule("interleaved", ranks, micro_batches, chunks)
            idle = (ranks - 1) / (chunks * micro_batches + ranks - 1)
            assert simulate(plan, cost).bubble == pytest.approx(idle)


def test_makespan_of_fewer_micro_batches_than_ranks():
    simulation = simulate(build_schedule("1f1b", 8, 3))
    assert simulation.makespan == (3 + 7) * 3
    assert simulation.bubble == pytest.approx(7 / 10)


def test_peak_live_equals_theory():
    for ranks, micro_batches in [(4, 8), (8, 16), (4, 2), (3, 9)]:
        assert simulate(build_schedule("gpipe", ranks, micro_batches)).peak_live == (micro_batches,) * ranks
        expected = tuple(min(ranks - rank, micro_batches) for rank in range(ranks))
        assert simulate(build_schedule("1f1b", ranks, micro_batches)).peak_live == expected
    for ranks, micro_batches, chunks in [(4, 8, 2), (4, 4, 3), (2, 8, 4)]:
        warm = [(chunks - 1) * ranks + 2 * (ranks - 1 - rank) for rank in range(ranks)]
        expected = tuple(min(each + 1, chunks * micro_batches) for each in warm)
        assert simulate(build_schedule("interleaved", ranks, micro_batches, chunks)).peak_live == expected
    assert simulate(build_schedule("interleaved", 4, 8, 2)).peak_live == (11, 9, 7, 5)


def test_split_backward_fills_the_bubble_and_holds_activations_until_w():
    by_hand = "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2\n1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2"
    assert parse_plan(by_hand) == build_schedule("zb_h1", 2, 3)
    whole, split = simulate(build_schedule("1f1b", 2, 3)), simulate(parse_plan(by_hand))
    assert (whole.makespan, split.makespan) == (12, 10)
    assert split.peak_live == (2, 2)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_zero_bubble_schedules_are_as_good_as_their_papers_say(ranks):
    """Idle (p-1)/(3m+p-1) and (p-1)/(6m+p-1) with F = I = W = 1, at no more than 1F1B's memory on its first rank."""
    for micro_batches in range(ranks, 4 * ranks + 1):
        for name, chunks, work in (("zb_h1", 1, 3), ("zb_v", 2, 6)):
            simulation = simulate(build_schedule(name, ranks, micro_batches, chunks))
            ideal = (ranks - 1) / (work * micro_batches + ranks - 1)
            between = name == "zb_v" and ranks < micro_batches < 1.5 * ranks
            assert ideal - 1e-9 <= simulation.bubble <= ideal * (1.8 if between else 1) + 1e-9, (name, micro_batches)
            assert max(simulation.peak_live) <= chunks * ranks


def test_uneven_stages_slow_the_pipeline_to_its_slowest():
    """With many micro-batches the slow stage is busy all the time, the others idle in proportion."""
    plan = build_schedule("1f1b", 3, 300)
    even = simulate(plan)
    uneven = simulate(plan, {"F": (1.0, 1.0, 1.5), "B": (2.0, 2.0, 3.0)})
    assert uneven.makespan / even.makespan == pytest.approx(1.5, rel=0.02)
    assert uneven.bubble == pytest.approx(1 - 3.5 / 4.5, rel=0.05)


def test_transfer_time_counts_once_for_each_border():
    """One micro-batch through 4 ranks: 3 borders forward and 3 back; between stages of one rank none."""
    plan = build_schedule("1f1b", 4, 1)
    assert simulate(plan, transfer=0.25).makespan == simulate(plan).makespan + 6 * 0.25
    one_rank = build_schedule("interleaved", 1, 2, 2)
    assert simulate(one_rank, transfer=0.25) == simulate(one_rank)


def test_timeline_never_overlaps_and_lists_the_plan():
    plan = build_schedule("interleaved", 4, 8, 3)
    simulation = simulate(lower(plan), {"F": 0.7, "B": tuple(1 + stage / 10 for stage in range(12))}, transfer=0.1)
    assert tuple(tuple(event.op for event in events) for events in simulation.timeline) == plan
    for events in simulation.timeline:
        assert all(before.end <= after.start for before, after in itertools.pairwise(events))


def swap(plan, rank, first, second):
    ops = [{first: second, second: first}.get(str(op), str(op)) for op in plan[rank]]
    return tuple(parse_plan(",".join(ops))[0] if index == rank else each for index, each in enumerate(plan))


def test_a_circle_of_waiting_ranks_is_named_alone():
    """Ranks 1 and 2 disagree about the order of two transfers; 0 and 3 only wait for them and are no cause."""
    broken = parse_plan("0F0,0SF0,0F1,0SF1,0RB0,0B0\n1RF0,1RF1,1F0,1F1,1SF1,1SF0\n2RF0,2RF1,2F0,2F1,2SF0\n3RF0,3F0,3B0")
    with pytest.raises(DeadlockError) as caught:
        check_deadlock(broken)
    assert str(caught.value) == (
        "deadlock: rank 1 at 1SF1 waits for 2RF1 of rank 2, which is at 2RF0; "
        "rank 2 at 2RF0 waits for 1SF0 of rank 1, which is at 1SF1"
    )
    assert {rank: str(op) for rank, op in caught.value.stopped.items()} == {0: "0RB0", 1: "1SF1", 2: "2RF0", 3: "3RF0"}


@pytest.mark.parametrize("rank", [1, 2])
def test_two_swapped_transfers_of_a_real_plan_are_caught(rank):
    """The same two receives in another order on one end only: nothing else changed."""
    lowered = lower(build_schedule("1f1b", 4, 8))
    broken = swap(lowered, rank, f"{rank}RF2", f"{rank}RF3")
    with pytest.raises(DeadlockError) as caught:
        check_deadlock(broken)
    assert {rank - 1, rank} <= set(caught.value.stopped)
    assert f"rank {rank} at {rank}RF3 waits for {rank - 1}SF3 of rank {rank - 1}" in str(caught.value)


def test_missing_receive_and_missing_sum_are_caught():
    lowered = lower(build_schedule("1f1b", 3, 4), tied=True)
    for lost, message in [
        (Op("T", 2, -1), "rank 0 at 0T waits for 2T of rank 2, which has finished"),
        (Op("SB", 2, 3), "rank 1 at 1RB3 waits for 2SB3 of rank 2, which"),
    ]:
        broken = tuple(tuple(op for op in ops if op != lost) for ops in lowered)
        with pytest.raises(DeadlockError, match=message):
            check_deadlock(broken)


def test_collective_before_a_transfer_is_caught():
    """The sum of tied gradients too early on the last rank: it waits for rank 0, which waits for a gradient."""
    lowered = lower(build_schedule("1f1b", 2, 2), tied=True)
    early = [op for op in lowered[1] if op.kind != "T"]
    early.insert(early.index(Op("SB", 1, 1)), Op("T", 1, -1))
    with pytest.raises(DeadlockError, match="rank 0 at 0RB1 waits for 1SB1 of rank 1, which is at 1T; rank 1 at 1T"):
        check_deadlock((lowered[0], tuple(early)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0SF0\n1F0,1RF0", "rank 1 runs 1F0 before it has the activation of stage 0, micro-batch 0"),
        ("0SF0,0F0\n1RF0,1F0", "rank 0 runs 0SF0 before it has the activation of stage 0"),
        ("0F0,0SF0,0B0\n1RF0,1F0,1B0", "rank 0 runs 0B0 before it has the gradient of stage 1"),
        ("0F0,0W0", "rank 0 runs 0W0 before it has the gradient of stage 0"),
        ("0F0,0RF0", "0RF0 has no other end"),
    ],
)
def test_use_before_arrival_is_caught(text, message):
    with pytest.raises(ScheduleError, match=re.escape(message)):
        check_deadlock(parse_plan(text))


def test_text_picture_shows_time_order_and_idleness():
    assert as_text(simulate(build_schedule("gpipe", 2, 2))).splitlines() == [
        "rank  0  0F0 0F1 .   .   .   0B0 --- 0B1 ---",
        "rank  1  .   1F0 1F1 1B0 --- 1B1 --- .   .",
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_written_whole_for_a_split_uneven_plan(tmp_path, suffix):
    simulation = simulate(build_schedule("zb_h1", 2, 3), {"F": (1.0, 2.0), "B": 2.0, "I": 1.0, "W": 0.5}, transfer=0.1)
    path = tmp_path / f"plan.{suffix}"
    draw(simulation, path, headline("by hand", simulation, 3))
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG\r\n") if suffix == "png" else b"<?xml" in start
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def run_tool(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_tool_draws_prints_and_lists_operations(tmp_path):
    picture = tmp_path / "schedule.png"
    done = run_tool("--ranks", 2, "--micro-batches", 2, "--text", "--operations", "--tied", "--output", picture)
    assert done.returncode == 0, done.stderr
    assert "1f1b: 2 ranks, 2 micro-batches, bubble 33.3%" in done.stdout
    lists = parse_plan("\n".join(done.stdout.splitlines()[3:5]))
    assert lists == lower(build_schedule("1f1b", 2, 2), tied=True)
    assert compute_ops(lists) == build_schedule("1f1b", 2, 2)
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schedule", "interleaved", "--virtual-stages", 2, "--micro-batches", 6, "--text"), "6 micro-batches"),
        (("--output", "plan.txt"), "plan.txt: images can be"),
        (("--output", "missing/plan.png"), "missing/plan.png: cannot be written"),
        ((), "give --output IMAGE, --text or --operations"),
    ],
)
def test_tool_refuses_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run_tool(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
