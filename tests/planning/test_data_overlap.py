"""What the planner says of data parallelism that nothing hides, and what its order wins."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.data_overlap import BEFORE, JOBS, PRACTICES, row
from benchmarks.planner.published import LLAMA3_8B
from megalite.planning import DEVICES, Job
from megalite.planning.data_overlap import exposed_data
from megalite.planning.stage_time import (
    gather_parameters,
    reduce_gradients,
    stage_works,
)
from megalite.planning.step_time import least_step_seconds, step_time
from megalite.planning.tensor_time import HIDDEN_SHARE
from megalite.schedule.ops import Op
from megalite.schedule.schedules import build_schedule
from megalite.schedule.simulate import completions, simulate

pytestmark = pytest.mark.fast

ROUNDING = 1e-9
"""Seconds that sums in another order may differ by."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "data_overlap.json"


def job(**fields):
    options = {"data": 16, "sequence": True, "tensor": 2, **fields}
    return Job(LLAMA3_8B, DEVICES["h100"], 4096, 1, options.pop("micro_batches", 16), **options)


def waits(of):
    return exposed_data(of, stage_works(of))


def test_one_stage_hides_what_fits_under_one_pass():
    of = replace(job(zero=1), seq_length=1024)
    (work,) = stage_works(of)
    gathers, reductions = waits(of)
    assert gathers >= gather_parameters(of, 0) - HIDDEN_SHARE * work.forward.seconds - ROUNDING > 0
    assert reductions >= reduce_gradients(of, 0) - HIDDEN_SHARE * work.backward.seconds - ROUNDING > 0
    slow = replace(of, seq_length=2**18)  # everything fits; what is left is one bucket
    bucket = [
        seconds / whole for seconds, whole in zip(waits(slow), (gather_parameters(of, 0), reduce_gradients(of, 0)))
    ]
    assert bucket[0] == pytest.approx(bucket[1]) and 0 < bucket[0] < 0.01


def test_what_queues_before_vectors_is_waited_for_whole():
    of = job(zero=2, pipeline=2, schedule="interleaved", virtual_stages=2)
    whole = max(sum(gather_parameters(of, stage) for stage in of.stages_of(rank)) for rank in range(2))
    assert waits(replace(of, practice=BEFORE))[0] == pytest.approx(whole)
    assert waits(of)[0] < whole / 2


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 4), ("zb_v", 2)])
def test_the_order_of_use_never_loses(schedule, chunks, zero):
    of = job(zero=zero, pipeline=4, schedule=schedule, virtual_stages=chunks)
    seconds = {
        name: round(step_time(replace(of, practice=practice)).seconds, 9) for name, practice in PRACTICES.items()
    }
    assert seconds["now"] <= min(seconds["gathers"], seconds["reductions"])
    assert max(seconds["gathers"], seconds["reductions"]) <= seconds["before"]
    assert (seconds["reductions"] < seconds["before"]) == (chunks > 1)  # one stage has nothing to compute after it
    assert (seconds["gathers"] < seconds["before"]) == (zero == 1)
    assert least_step_seconds(of) <= seconds["now"] + 1e-9


def test_a_pause_keeps_the_rank_and_not_what_it_made():
    plan, costs = build_schedule("1f1b", 2, 3, 1), {"F": 1.0, "B": 2.0}
    plain = simulate(plan, costs).makespan
    after_last = Op("B", 1, 2)
    paused = list(completions(plan, costs, 0.0, {after_last: 50.0}))
    assert max(event.end for event in paused) == plain  # the gradient was on its way; no operation follows
    in_between = list(completions(plan, costs, 0.0, {Op("F", 0, 0): 50.0}))
    assert max(event.end for event in in_between) > plain + 40
    assert next(event.start for event in in_between if event.op == Op("F", 1, 0)) == 1.0


def test_the_committed_figures_are_the_planners():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert len(rows) == 2 * len(JOBS)
    for each in (rows[3], rows[-3]):
        assert row(each["recipe"], each["gpus"], each["changes"], each["device"]) == each
