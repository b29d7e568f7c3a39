"""Schedules: op for op what PyTorch publishes, sound in themselves, and refused in words where they do not apply."""

import re
from unittest import mock

import pytest

from megalite.errors import UserError
from megalite.schedule.ops import Op, ScheduleError, compute_ops, format_plan, parse_op, parse_plan
from megalite.schedule.schedules import SCHEDULES, build_schedule, forward_only, place_stages

pytestmark = pytest.mark.fast

SIZES = [(2, 4), (3, 6), (4, 8), (4, 16), (8, 8)]


def torch_plan(name, ranks, micro_batches, chunks):
    """PyTorch's published plan, read through its text form; idle slots and reductions fall away."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    actions = visualizer.get_schedule_ops(name, ranks, micro_batches, chunks if chunks > 1 else None)
    lines = (",".join("" if action is None else str(action) for action in row) for row in actions)
    return compute_ops(parse_plan("\n".join(lines)))


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_gpipe_equals_torch(ranks, micro_batches):
    assert build_schedule("gpipe", ranks, micro_batches) == torch_plan("GPipe", ranks, micro_batches, 1)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_equals_torch(ranks, micro_batches, chunks):
    ours = build_schedule("interleaved", ranks, micro_batches, chunks)
    assert ours == torch_plan("Interleaved1F1B", ranks, micro_batches, chunks)


@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_1f1b_equals_torch_but_for_its_last_rank(ranks, micro_batches):
    """torch publishes forwards 1..m instead of 0..m-1 on the last rank (its own execution does not use that list)."""
    ours, theirs = build_schedule("1f1b", ranks, micro_batches), torch_plan("1F1B", ranks, micro_batches, 1)
    assert ours[:-1] == theirs[:-1]
    last = ranks - 1
    assert ours[-1] == tuple(Op(kind, last, micro) for micro in range(micro_batches) for kind in "FB")


def test_interleaved_is_loaded_by_torch_from_our_text(tmp_path):
    """A plan of compute operations is PyTorch's CSV: its runtime loads it, validates it and lowers it."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    plan = build_schedule("interleaved", 4, 8, 2)
    (tmp_path / "plan.csv").write_text(format_plan(plan))
    stage = mock.create_autospec(
        schedules._PipelineStageBase, instance=True, group_rank=0, group_size=4, submod=None, num_stages=8
    )
    runtime = schedules._PipelineScheduleRuntime([stage, stage], 8)
    runtime._load_csv(str(tmp_path / "plan.csv"))
    loaded = [[str(action) for action in runtime.pipeline_order[rank]] for rank in range(4)]
    assert loaded == [[str(op) for op in ops] for ops in plan]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_micro_batch_once_and_backwards_in_order(name, ranks):
    """Gradients are summed in micro-batch order on every stage: what makes all layouts bitwise equal to one process."""
    schedule = SCHEDULES[name]
    chunks = 3 if schedule.interleaves else schedule.chunks
    owners = place_stages(name, ranks, chunks)
    for micro_batches in range(ranks, 17, ranks) if schedule.interleaves else range(1, 17):
        plan = build_schedule(name, ranks, micro_batches, chunks)
        for rank, ops in enumerate(plan):
            assert {op.stage for op in ops} == {stage for stage, owner in enumerate(owners) if owner == rank}
            for stage in {op.stage for op in ops}:
                for kind in "FIW" if name.startswith("zb") else "FB":
                    micros = [op.micro for op in ops if (op.kind, op.stage) == (kind, stage)]
                    assert micros == list(range(micro_batches))


def test_forward_only_has_each_forward_once_for_any_count():
    for owners, micro_batches in [([0], 1), ([0, 1, 2, 3] * 2, 6), ([0, 1, 2] * 4, 2), ([0, 1, 1, 0], 5)]:
        plan = forward_only(owners, micro_batches)
        assert sorted(op for ops in plan for op in ops) == [
            Op("F", stage, micro) for stage in range(len(owners)) for micro in range(micro_batches)
        ]
        assert all(owners[op.stage] == rank for rank, ops in enumerate(plan) for op in ops)


def test_a_v_turns_at_the_last_rank():
    assert place_stages("zb_v", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert place_stages("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "field", "value", "remedy"),
    [
        (("1fb1", 4, 8, 1), "parallel.schedule", "'1fb1'", "did you mean 1f1b"),
        (("afab", 4, 8, 1), "parallel.schedule", "'afab'", "gpipe, 1f1b, interleaved"),
        (("gpipe", 0, 8, 1), "parallel.pipeline", "= 0", "at least 1"),
        (("1f1b", 4, 0, 1), "train.global_batch_size", "0 micro-batches", "at least train.micro_batch_size"),
        (("1f1b", 4, 8, 2), "parallel.virtual_stages", "= 2", 'parallel.schedule = "interleaved"'),
        (("zb_v", 4, 8, 1), "parallel.virtual_stages", "= 1", "parallel.virtual_stages = 2"),
        (("interleaved", 4, 8, 1), "parallel.virtual_stages", "= 1", "parallel.virtual_stages = 2 or more"),
        (("interleaved", 4, 10, 2), "train.global_batch_size", "10 micro-batches", "8 or 12"),
        (("interleaved", 4, 3, 2), "train.global_batch_size", "3 micro-batches", "there are 4,"),
    ],
)
def test_impossible_requests_name_field_value_and_remedy(arguments, field, value, remedy):
    with pytest.raises(UserError) as caught:
        build_schedule(*arguments)
    message = str(caught.value)
    assert field in message and value in message and remedy in message and "\n" not in message


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 2), ("1f1b", 0), ("interleaved", 1), ("zb_h1", 2), ("zb_v", 1)])
def test_schedule_functions_refuse_chunks_they_cannot_place(name, chunks):
    with pytest.raises(ValueError, match=re.escape(f"{name} cannot place {chunks} chunks")):
        SCHEDULES[name].build(4, 8, chunks)


def test_text_form_round_trips_and_reads_torch_spelling():
    text = "0F0,0SF0,10B12,3I4,3W4,0T,0R\n1RF0,1F0,1B0,1SB0\n"
    assert format_plan(parse_plan(text)) == text
    assert parse_plan("2F0,,3SEND_F1\n2RECV_B7, 2REDUCE_GRAD") == (
        (Op("F", 2, 0), Op("SF", 3, 1)),
        (Op("RB", 2, 7), Op("R", 2, -1)),
    )


@pytest.mark.parametrize("text", ["F0", "2X0", "2F", "0T0", "2F-1", "1UNSHARD", "(0F3;3B1)OVERLAP_F_B", "2f0"])
def test_text_that_is_no_operation_is_refused(text):
    with pytest.raises(ScheduleError, match=re.escape(repr(text))):
        parse_op(text)
