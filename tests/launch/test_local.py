"""launch/local.sh: exit codes, signals, messages, no orphans; a tiny model on two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import rank_environment, take_processes
from megalite.errors import UserError
from megalite.processes import outcome
from tests.support.patience import wait_until
from tests.support.tiny import write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, parallel={"tensor": 2})


def start(recipe, *arguments):
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/local.sh"), str(recipe), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, timeout=300):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def steps_done(recipe):
    metrics = recipe.parent / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for_step(recipe, process, step):
    wait_until(lambda: steps_done(recipe)[-1:] >= [step], process, told=lambda: (process.kill(), process.communicate()))


def ranks_of(recipe):
    """Processes, anywhere on the machine, whose command line names this recipe."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(recipe).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_run_to_the_end_and_again(recipe, monkeypatch):
    temporary = recipe.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    code, _, errors = finish(start(recipe))
    assert code == 0, errors
    assert steps_done(recipe) == list(range(1, 7))
    assert sorted(path.name for path in (recipe.parent / "run/log").glob("rank_*")) == [
        "rank_00000.log",
        "rank_00001.log",
    ]
    code, _, errors = finish(start(recipe))
    assert code == 0 and len(steps_done(recipe)) == 6, errors
    assert not list(temporary.iterdir()), "the launcher leaves nothing behind"


def test_a_stop_is_exit_75_and_the_same_command_goes_on(recipe):
    process = start(recipe, "--train.steps", "2000")
    wait_for_step(recipe, process, 2)
    process.send_signal(signal.SIGUSR1)
    code, _, errors = finish(process)
    assert code == 75, errors
    last = steps_done(recipe)[-1]
    assert last < 2000 and (recipe.parent / f"run/checkpoints/step_{last:08d}").is_dir()
    code, _, errors = finish(start(recipe, "--train.steps", "2000", "--train.stop_after", str(last + 3)))
    assert code == 0 and steps_done(recipe)[-3:] == [last + 1, last + 2, last + 3], errors
    assert not ranks_of(recipe)


def test_ctrl_c_is_exit_130_without_a_wall(recipe):
    process = start(recipe, "--train.steps", "2000")
    wait_for_step(recipe, process, 2)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == 130 and "Traceback" not in errors, errors
    assert not ranks_of(recipe)


def test_a_killed_rank_is_a_fault_and_leaves_nobody_behind(recipe):
    process = start(recipe, "--train.steps", "2000")
    wait_for_step(recipe, process, 2)
    victim = max(rank for rank in ranks_of(recipe) if rank != process.pid)
    os.kill(victim, signal.SIGKILL)
    code, _, errors = finish(process)
    assert code not in (0, 2, 75, 130), errors
    assert "died of SIGKILL" in errors
    assert not ranks_of(recipe)


def wait_for_none_of(recipe):
    wait_until(lambda: not ranks_of(recipe), told=lambda: ranks_of(recipe))


def listens(pid):
    """Whether a process answers SIGTERM, or lets it wait: it is past the moment at which bash does not yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigCgt", "SigBlk"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


def moment_of(recipe, process, moment):
    """Wait for a moment of the start-up: so many ranks, and so many seconds afterwards."""
    ranks, seconds = moment
    while not listens(process.pid) and process.poll() is None:
        time.sleep(0.001)
    while len(ranks_of(recipe)) < 1 + ranks and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)


MOMENTS = [(-1, 0.0), (0, 0.0), (0, 0.3), (1, 0.0), (2, 0.0), (2, 1.0)]
"""(ranks that have been started, seconds later); with -1 ranks nothing is there but bash, in its first line."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_request_at_any_moment_of_start_up(recipe, moment):
    process = start(recipe, "--train.steps", "100000")
    moment_of(recipe, process, moment)
    process.send_signal(signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 75, errors
    wait_for_none_of(recipe)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_launcher_killed_at_any_moment_of_start_up_leaves_no_orphans(recipe, moment):
    process = start(recipe, "--train.steps", "100000")
    moment_of(recipe, process, moment)
    process.kill()
    finish(process)
    wait_for_none_of(recipe)


def test_ranks_do_not_outlive_a_launcher_that_is_killed(recipe):
    process = start(recipe, "--train.steps", "100000")
    wait_for_step(recipe, process, 2)
    process.kill()
    finish(process)
    wait_for_none_of(recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "3"], "3 processes are not divisible by parallel.tensor = 2"),
        (["--model.layrs", "3"], "--model.layrs is unknown; did you mean model.layers?"),
        (["--processes", "no"], "--processes no is not a number of processes"),
        (["--data.train", "gone"], "gone.bin does not exist"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(recipe, arguments, message):
    code, output, errors = finish(start(recipe, *arguments))
    assert code == 2 and not output
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert not (recipe.parent / "run").exists()


def test_check_only(recipe):
    code, output, errors = finish(start(recipe, "--check"))
    assert code == 0 and "2 ranks" in output and not errors
    assert not (recipe.parent / "run" / "config.toml").exists()


def test_a_check_on_cpus_does_not_wait_for_torch(recipe, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    code, output, errors = finish(start(recipe, "--check"))
    assert code == 0 and "2 ranks" in output
    imported = {line.rpartition("|")[2].strip() for line in errors.splitlines()}
    assert "megalite.config" in imported and not imported & {"torch", "rich", "matplotlib"}


@pytest.mark.fast
def test_processes_are_taken_from_anywhere():
    assert take_processes(["r.toml", "--processes", "4", "--a.b", "1"]) == (["r.toml", "--a.b", "1"], 4)
    assert take_processes(["--processes=2", "r.toml"]) == (["r.toml"], 2)
    assert take_processes(["r.toml"]) == (["r.toml"], None)
    for arguments in (["--processes"], ["--processes", "0"], ["--processes=-1"]):
        with pytest.raises(UserError, match="--processes"):
            take_processes(arguments)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("codes", "requests", "expected"),
    [
        ([0, 0], [], 0),
        ([0, 0], [signal.SIGTERM], 0),  # it came too late
        ([], [signal.SIGTERM], 75),  # before the first rank was started
        ([2, 1], [], 2),
        ([2], [signal.SIGTERM], 2),
        ([75, 75], [signal.SIGTERM], 75),
        ([75], [], 75),
        ([75, 1], [], 1),
        ([-signal.SIGTERM, 75], [signal.SIGTERM], 75),  # one rank did not listen yet
        ([-signal.SIGTERM], [], 1),
        ([-signal.SIGKILL], [signal.SIGUSR1], 1),
        ([130, 1], [], 130),
        ([1], [signal.SIGINT], 130),
        ([7, 1], [], 7),
    ],
)
def test_exit_code_of_the_whole(codes, requests, expected):
    assert outcome(codes, requests) == expected


@pytest.mark.fast
def test_surroundings_of_ranks():
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(1, 0)["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(1000, 0)["OMP_NUM_THREADS"] == "1"
    assert "MALLOC_MMAP_MAX_" in rank_environment(2, 0) and "MALLOC_MMAP_MAX_" not in rank_environment(2, 1)
    assert rank_environment(2, 2)["TORCH_NCCL_HIGH_PRIORITY"] == "1"
