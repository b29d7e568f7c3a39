"""The recorder: what it counts as what, in marks of a clock that runs by hand; files that stay small and survive."""

import json
import os
import subprocess
import sys

import pytest
import torch

from megalite.mesh import AXES, Mesh
from megalite.observe import lines, timeline
from megalite.observe.lines import LineFile, read_lines
from megalite.observe.timeline import PHASES, HostClock, Recorder, StreamClock, compact, current, merge
from megalite.schedule.ops import parse_op

pytestmark = pytest.mark.fast


class HandClock:
    """Time moves by `advance`. With `delay` 1 it is as a GPU's stream: late marks cannot be read."""

    def __init__(self, delay):
        self.delay, self.now, self.marks, self.freed = delay, 0.0, 0, []
        self.readable = 0.0

    def advance(self, seconds):
        self.now += seconds

    def mark(self):
        self.marks += 1
        return self.now

    def seconds(self, first, second):
        assert max(first, second) <= self.readable or not self.delay, "a mark was read that may lie ahead"
        return second - first

    def free(self, marks):
        self.freed += marks


class Waits:
    """A mesh's groups, as far as the recorder sees them."""

    def __init__(self, monkeypatch, **sizes):
        self.mesh = Mesh(**sizes, make_group=lambda ranks, rank: None)
        monkeypatch.setattr(
            Mesh, "observe_waits", lambda mesh, observe: setattr(self, "observe", observe), raising=True
        )

    def __call__(self, *axes):
        return self.observe(axes or AXES)


def run_step(recorder, clock, waits, number, slow=0.0):
    """data 1, F0 with 2 of 5 in a wait for a neighbour and 1 for tensor peers, SF 0.5, B 7 with 1 of tensor, 0.25 of a
    bucket, R 3, agreement 4, optimizer 2 with 0.5 of gathering, and 0.75 that nobody claims."""
    with recorder.step(number):
        with recorder.phase("data"):
            clock.advance(1)
        with recorder.observe(parse_op("1F0")):
            with waits("pp"):
                clock.advance(2)
            clock.advance(2 + slow)
            with waits("tp"):
                clock.advance(1)
        with recorder.observe(parse_op("1SF0")):
            clock.advance(0.5)
        with recorder.observe(parse_op("1B0")):
            clock.advance(5.75)
            with waits("tp"):
                clock.advance(1)
            with waits("dp", "cp"):
                clock.advance(0.25)
        with recorder.observe(parse_op("1R")), waits("dp", "cp"):
            clock.advance(3)
        clock.advance(0.75)
        with waits():
            clock.advance(4)
        clock.advance(1.5)
        with waits("dp", "cp"):
            clock.advance(0.5)
        with waits("dp", "ep", "cp", "tp"):
            clock.advance(0.125)


def rows_of(tmp_path):
    return read_lines(tmp_path / "timeline" / "rank_00001.jsonl")


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    def make(delay):
        waits = Waits(monkeypatch, pp=2, rank=1)
        clock = HandClock(delay)
        return Recorder(waits.mesh, tmp_path, clock), clock, waits

    return make


def test_every_second_is_counted_once_and_under_its_name(recorder, tmp_path):
    made, clock, waits = recorder(0)
    run_step(made, clock, waits, 7)
    made.close()
    seconds = next(row for row in rows_of(tmp_path) if "seconds" in row)["seconds"]
    assert seconds == {
        "data": 1, "forward": 2, "backward": 5.75, "wait_pipeline": 2.5, "wait_tensor": 2, "wait_context": 0,
        "wait_expert": 0, "reduce": 3.25, "wait_others": 4, "optimizer": 1.5, "wait_optimizer": 0.125, "gather": 0.5,
        "rollout": 0, "reward": 0, "score": 0, "other": 0.75,
    }  # fmt: skip
    assert sum(seconds.values()) == clock.now and tuple(seconds) == PHASES
    assert made.work_seconds[-1] == 1 + 2 + 5.75 + 1.5 + 0.75 and made.optimizer_seconds == 1.625


def test_on_a_stream_marks_are_read_a_step_later_and_used_again(recorder, tmp_path):
    made, clock, waits = recorder(1)
    for number in range(1, 5):
        run_step(made, clock, waits, number, slow=number)
        clock.readable = clock.now  # the agreement of this step has made all that is before it readable
        assert len(made.work_seconds) == (1 if number > 3 else 0), "only the sampled third step saw every wait"
    made.close()
    rows = rows_of(tmp_path)
    means = [row for row in rows if "seconds" in row]
    assert means[0]["steps"] + sum(row["steps"] for row in means[1:]) == 3, "the last step's marks were never read"
    sampled = next(row for row in rows if "operations" in row)
    assert sampled["step"] == 3


def test_operations_are_told_relative_to_the_agreement(recorder, tmp_path):
    made, clock, waits = recorder(0)
    for number in (1, 2, 25):
        clock.advance(100)
        run_step(made, clock, waits, number)
    made.close()
    sample = [row for row in rows_of(tmp_path) if "operations" in row][-1]
    agreed = 5 + 0.5 + 7 + 3 + 0.75 + 4
    assert sample["step"] == 25
    assert sample["operations"] == [["1F0", -agreed, 5 - agreed], ["1B0", 5.5 - agreed, 12.5 - agreed],
                                    ["1R", 12.5 - agreed, 15.5 - agreed]]  # fmt: skip
    assert sample["waits"] == [["pp", -agreed, 2 - agreed]]


def test_a_step_that_raises_leaves_nothing_open(recorder):
    made, clock, waits = recorder(0)
    with pytest.raises(RuntimeError), made.step(1), made.observe(parse_op("0F0")):
        raise RuntimeError
    with waits("pp"):
        clock.advance(1)
    run_step(made, clock, waits, 2)
    assert len(made.work_seconds) == 1


def test_validation_between_steps_is_not_counted(recorder, tmp_path):
    made, clock, waits = recorder(1)
    clock.readable = 1e9
    for number in range(1, 5):
        run_step(made, clock, waits, number)
        with made.observe(parse_op("0F0")), waits("pp"):
            clock.advance(50)
    made.close()
    (row,) = [row for row in rows_of(tmp_path) if "seconds" in row]
    assert sum(row["seconds"].values()) == pytest.approx(23.375) and row["seconds"]["forward"] == pytest.approx(
        3 - 1 / 3, abs=1e-5
    )


def test_the_file_stays_small_and_keeps_the_means(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "_WINDOW_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(timeline, "_LIMIT_BYTES", 20_000)
    made, clock, waits = recorder(0)
    for number in range(1, 1001):
        run_step(made, clock, waits, number, slow=float(number))
    made.close()
    rows = rows_of(tmp_path)
    assert (tmp_path / "timeline" / "rank_00001.jsonl").stat().st_size < 25_000
    means = current(rows)
    assert means[0]["first"] == 1 and means[-1]["last"] == 1000 and sum(row["steps"] for row in means) == 1000
    total = sum(row["seconds"]["forward"] * row["steps"] for row in means)
    assert total == pytest.approx(sum(2 + number for number in range(1, 1001)), rel=1e-5)
    assert rows[0]["rank"] == 1 and 1 <= sum("operations" in row for row in rows) <= 10


def test_steps_made_again_replace_the_first_try():
    def row(first, last, value):
        return {"first": first, "last": last, "steps": last - first + 1, "seconds": {"forward": value}}

    rows = [row(1, 10, 1.0), row(11, 20, 2.0), row(21, 25, 9.0), {"rank": 0, "shape": {}}, row(16, 30, 3.0)]
    assert [(kept["first"], kept["seconds"]["forward"]) for kept in current(rows)] == [(1, 1.0), (16, 3.0)]
    merged = merge(row(1, 10, 1.0) | {"memory_gib": 5.0}, row(11, 40, 3.0) | {"memory_gib": 4.0})
    assert merged["seconds"]["forward"] == 2.5 and merged["steps"] == 40 and merged["memory_gib"] == 5.0
    assert len(compact([*rows, *({"step": step, "operations": []} for step in range(9))])) == 1 + 1 + 3


def test_measuring_costs_next_to_nothing(tmp_path):
    """300 operations with a wait each, as a step of many micro-batches has them: below 0.5 % of 2 seconds."""
    recorder, clock = Recorder(Mesh(), tmp_path), HostClock()
    op, best = parse_op("0F0"), float("inf")
    for number in range(26, 46):
        began = clock.mark()
        with recorder.step(number):
            for _ in range(300):
                with recorder.observe(op), recorder._wait(("pp",)):
                    pass
        best = min(best, clock.seconds(began, clock.mark()))
    recorder.close()
    assert best < 0.005 * 2.0, f"{1e3 * best:.2f} ms"


@pytest.mark.gpu
def test_stream_clock_measures_what_the_gpu_does():
    clock = StreamClock()
    first = clock.mark()
    torch.cuda._sleep(10_000_000)
    second = clock.mark()
    torch.cuda.synchronize()
    assert 1e-3 < clock.seconds(first, second) < 1.0
    clock.free([first, second])
    assert clock.mark() in (first, second)


def test_a_full_disk_does_not_end_the_run_and_loses_no_line(tmp_path, caplog):
    """The kernel takes a part of a line, then nothing, then everything again."""
    code = """
import resource, signal, sys, logging
from pathlib import Path
from megalite.observe.lines import LineFile
logging.basicConfig(stream=sys.stdout, format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = LineFile(Path(sys.argv[1]), "rank 3")
for number in range(10):
    if number == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    if number == 7:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.write({"number": number, "padding": "x" * 10})
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["number"] for row in read_lines(tmp_path / "rows")] == list(range(10))
    said = done.stdout.splitlines()
    assert len(said) == 2 and said[0].startswith("rank 3: ") and "training goes on" in said[0] and "again" in said[1]


def test_what_a_disk_that_stays_full_does_not_take_is_bounded(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(lines, "_PENDING_BYTES", 1000)
    file = LineFile(tmp_path / "rows", "rank 0")
    file.path = type(tmp_path)("/dev/full")
    for number in range(1000):
        file.write({"number": number})
    assert len(file._pending) <= 1000 + 20
    assert json.loads(file._pending.splitlines()[-1]) == {"number": 999}


def test_a_line_that_a_crash_cut_short_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b'{"number": 1}\n{"num')
    file = LineFile(path, "rank 0")
    file.write({"number": 2})
    assert [row["number"] for row in read_lines(path)] == [1, 2]


@pytest.mark.parametrize("part", ["rollout", "reward", "score"])
def test_what_comes_before_a_policys_update_is_one_part(recorder, tmp_path, part):
    made, clock, waits = recorder(0)
    with made.step(7):
        with made.phase(part):
            clock.advance(1)
            with made.observe(parse_op("1F0")), waits("pp"):
                clock.advance(2)
        with made.observe(parse_op("1B0")):
            clock.advance(4)
        with waits():
            clock.advance(0.5)
    made.close()
    seconds = next(row for row in rows_of(tmp_path) if "seconds" in row)["seconds"]
    assert {name: each for name, each in seconds.items() if each} == {part: 3, "backward": 4, "wait_others": 0.5}
