"""Check, lock, accept, then write: a start that is refused leaves everything as it was, and one that is asked to stop
before it trains ends with 75, at whatever moment it is asked."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.checkpoint.identity import IDENTITY
from megalite.checkpoint.lock import LOCK, RunLock
from megalite.checkpoint.manifest import MANIFEST, Manifest
from megalite.config import load_config
from megalite.errors import FINISHED, INTERRUPTED, STOPPED, UNUSABLE, UserError
from megalite.runtime import World, _orphaned, choose_device
from megalite.train.__main__ import main
from megalite.train.loop import TrainingRun
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tests.support.tiny import write_recipe, write_tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    return str(write_recipe(tmp_path, train={"steps": 4}, checkpoint={"interval": 2}))


def content(folder):
    """Every name below a folder, and what it holds."""
    found = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def without_ids(folder):
    """Make a checkpoint what an older version would have written."""
    manifest = Manifest.from_file(folder / MANIFEST)
    (folder / MANIFEST).write_bytes(dataclasses.replace(manifest, run="").to_bytes())


# Refusals


def stranger(tmp_path, run):
    """Another run's checkpoint of a later step, complete, in the run's place."""
    other = tmp_path / "other"
    assert main([str(tmp_path / "recipe.toml"), "--run.dir", str(other), "--optimizer.lr", "0.5"]) == FINISHED
    shutil.copytree(other / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000005")
    shutil.rmtree(other)


REFUSALS = {
    "another model": (["--model.layers", "3"], lambda tmp_path, run: None, "model.layers is 2"),
    "other data": ([], lambda tmp_path, run: write_tokens(tmp_path / "tokens"), "the training data is not that of"),
    "in use": ([], lambda tmp_path, run: RunLock(run), "in use by process"),
    "a stranger": ([], stranger, "step_00000005 is of another run"),
    "an id that is none": ([], lambda tmp_path, run: (run / IDENTITY).write_text("x" * 40), "holds no id of a run"),
}


@pytest.mark.fast
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refused_start_changes_nothing(recipe, tmp_path, capsys, kind):
    run = tmp_path / "run"
    assert main([recipe]) == FINISHED
    (run / "checkpoints" / "step_00000003.partial").mkdir()
    options, prepare, message = REFUSALS[kind]
    held = prepare(tmp_path, run)
    before = content(run)
    capsys.readouterr()
    assert main([recipe, *options, "--train.steps", "6"]) == UNUSABLE
    assert content(run) == before
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and message in told[0]
    del held


def test_a_refused_first_start_leaves_no_directory(recipe, tmp_path):
    assert main([recipe, "--checkpoint.load", str(tmp_path / "nowhere")]) == UNUSABLE
    assert not (tmp_path / "run").exists()


@pytest.mark.fast
def test_a_recipe_in_the_run_directory_is_its_authors(recipe, tmp_path):
    own = tmp_path / "run" / "config.toml"
    own.parent.mkdir()
    own.write_text("# mine\n" + Path(recipe).read_text())
    text = own.read_text()
    assert main([str(own), "--train.steps", "2"]) == FINISHED
    assert own.read_text() == text
    saved = tmp_path / "run" / "checkpoints" / "step_00000002" / "config.toml"
    assert load_config(saved).train.steps == 2


def test_a_second_run_is_refused_before_torch_is_imported_and_told_once(recipe, tmp_path):
    lock = RunLock(tmp_path / "run")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    program = (
        "import sys; from megalite.train.__main__ import main\n"
        "code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, recipe, "--train.global_batch_size", "8"],
        cwd=ROOT,
        env=os.environ | place | {"RANK": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == UNUSABLE and done.stdout == "False\n"
    assert done.stderr.count("error: ") == 1 and "in use by process" in done.stderr
    lock.release()
    assert not (tmp_path / "run").exists()


# Whose checkpoint


def test_a_stranger_is_taken_when_told_and_known_from_then_on(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([recipe]) == FINISHED
    own = (run / IDENTITY).read_text()
    assert Manifest.from_file(run / "checkpoints" / "step_00000004" / MANIFEST).run == own.strip()
    stranger(tmp_path, run)
    assert main([recipe, "--checkpoint.allow_other_run", "true"]) == FINISHED
    assert (run / IDENTITY).read_text().startswith(own)
    assert main([recipe]) == FINISHED


def test_a_lost_id_is_found_in_the_checkpoints(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([recipe]) == FINISHED
    own = (run / IDENTITY).read_text()
    (run / IDENTITY).unlink()
    assert main([recipe]) == FINISHED
    assert (run / IDENTITY).read_text() == own
    (run / IDENTITY).unlink()
    stranger(tmp_path, run)
    assert main([recipe]) == UNUSABLE
    assert "checkpoints of several runs lie here" in capsys.readouterr().err


def test_checkpoints_without_an_id_are_taken(recipe, tmp_path):
    run = tmp_path / "run"
    assert main([recipe]) == FINISHED
    for path in (run / "checkpoints").iterdir():
        without_ids(path)
    (run / IDENTITY).unlink()
    assert main([recipe, "--train.stop_after", "4"]) == FINISHED


# Requests to stop


def start(recipe, *options, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "megalite.train", recipe, *options],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1)),
    )


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_at_any_moment_of_the_start_up(recipe, tmp_path, seconds, number):
    """A launcher that blocks the signals until someone listens loses none of them."""
    process = start(recipe, "--train.steps", "100000")
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == STOPPED, said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / LOCK).exists()


def serves(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)])
def test_a_rank_that_waits_for_the_others_ends_when_asked(recipe, tmp_path, number, code):
    """In a library that does not return to Python before its peers come, which here is never."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    options = ("--train.global_batch_size", "8")
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = start(recipe, *options, **place)
    wait_until(lambda: serves(port), process)  # rank 0 has its store: it waits for rank 1 from then on
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, said
    assert not (tmp_path / "run").exists(), "lock and directory go with a start that wrote nothing"


def test_ctrl_c_tells_what_is_kept_and_how_to_stop(recipe, tmp_path, monkeypatch, capsys):
    save = TrainingRun._save

    def interrupted(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "_save", interrupted)
    assert main([recipe]) == INTERRUPTED
    said = capsys.readouterr().err
    assert f"interrupted: the newest checkpoint is {tmp_path}/run/checkpoints/step_00000002" in said
    assert "SIGTERM" in said
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stop" and events[-1]["code"] == INTERRUPTED


def test_only_init_as_the_parent_of_torchruns_worker_is_an_orphans():
    torchrun = {"TORCHELASTIC_RUN_ID": "x"}
    with contextlib.suppress(PermissionError):
        assert _orphaned(torchrun, 1) == (os.readlink("/proc/1/exe") != os.readlink("/proc/self/exe"))
    assert not _orphaned(torchrun, 12345)
    assert not _orphaned({}, 1)


# The environment


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "RANK = ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"RANK": "-1"}, "RANK = '-1'"),
        ({"RANK": "9" * 5000}, "RANK = '999"),
        ({"RANK": "²"}, "RANK = '²'"),
        ({"LOCAL_RANK": " "}, "LOCAL_RANK = ' '"),
        ({"RANK": "2"}, "RANK = 2 is not below WORLD_SIZE = 2"),
        ({"MASTER_PORT": ""}, "MASTER_PORT = ''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_a_place_that_is_none_is_named(changes, message):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert World.from_environment(place) == World(0, 2, 0)
    with pytest.raises(UserError, match=message):
        World.from_environment(place | changes)


@pytest.mark.parametrize(
    ("count", "visible", "local", "index"),
    [(8, None, 3, 3), (1, "5", 3, 0), (1, None, 0, 0), (1, None, 3, None), (2, "0,1", 3, None), (2, "0,1", 1, 1)],
)
def test_where_a_task_sees_one_gpu_it_takes_that(recipe, monkeypatch, count, visible, local, index):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
    config = load_config(recipe, ["--run.device", "cuda"])
    if index is None:
        with pytest.raises(UserError, match="local rank 3 has no GPU"):
            choose_device(config, World(local, 8, local))
    else:
        assert choose_device(config, World(local, 8, local)).index == index
