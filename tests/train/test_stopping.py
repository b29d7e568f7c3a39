"""A request to stop is heard wherever all ranks can agree: at the end of a step, an evaluation, the start-up."""

import json
import os
import signal

import pytest

from megalite.errors import FINISHED, STOPPED
from megalite.train.__main__ import main
from megalite.train.loop import TrainingRun
from megalite.train.trainer import Trainer
from tests.support.tiny import write_recipe

pytestmark = pytest.mark.fast


@pytest.fixture
def arguments(tmp_path):
    train = {"steps": 9, "global_batch_size": 2, "eval_interval": 4, "eval_samples": 2}
    return [str(write_recipe(tmp_path, data={"valid": [str(tmp_path / "tokens")]}, train=train))]


def steps(folder):
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def interrupted(function):
    """`function`, with a request to stop that arrives while it runs."""

    def wrapper(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        return function(self, *args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("owner", "name", "last"),
    [(Trainer, "evaluate", 4), (TrainingRun, "_save", 8), (TrainingRun, "_start", 0), (Trainer, "accumulate", 2)],
)
def test_where_a_request_is_heard(arguments, tmp_path, monkeypatch, owner, name, last):
    arguments += ["--checkpoint.interval", "7"]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted(getattr(owner, name)))
        assert main(arguments) == STOPPED
    assert steps(tmp_path) == list(range(1, last + 1))
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved[-1:] == ([f"step_{last:08d}"] if last else [])
    assert main(arguments) == FINISHED
    assert steps(tmp_path) == list(range(1, 10))


def test_a_stopped_and_resumed_run_computes_what_an_undisturbed_one_does(arguments, tmp_path, monkeypatch):
    def computed(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]

    assert main([*arguments, "--run.dir", str(tmp_path / "undisturbed")]) == FINISHED
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", interrupted(Trainer.evaluate))
        assert main(arguments) == STOPPED
    assert main(arguments) == FINISHED
    assert computed(tmp_path / "run") == computed(tmp_path / "undisturbed")
