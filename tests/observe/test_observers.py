"""What stands beside a run never ends it: every observer fails in its own way, and the run ends as it would have."""

import contextlib
import itertools
import json
import math
import shutil
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch

from megalite.config import build_config
from megalite.data.indexed import IndexedWriter
from megalite.errors import FAULT, FINISHED, UserError
from megalite.mesh import Mesh
from megalite.observe import observers, trackers
from megalite.observe.events import EventLog
from megalite.observe.metrics import StepMetrics, final_losses, read_metrics
from megalite.observe.observers import Guard, Observers
from megalite.observe.trackers import kept_id, require_credentials
from megalite.train import task
from megalite.train.__main__ import main
from megalite.train.trainer import Trainer
from tests.support.tiny import write_recipe

pytestmark = pytest.mark.fast


def fail(*arguments, **named):
    raise OSError(28, "No space left on device")


class Writer:
    """A stand-in for TensorBoard's; `failing` is shared by all, as a disk is."""

    failing = False
    made = 0
    scalars: ClassVar[list] = []

    def __init__(self, *arguments, **named):
        Writer.made += 1
        if Writer.failing:
            fail()

    def add_scalar(self, name, value, step):
        if Writer.failing:
            fail()
        Writer.scalars.append((name, value, step))

    def close(self):
        if Writer.failing:
            fail()


class Wandb(types.ModuleType):
    """A stand-in for the wandb module; keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **named):
        self.started.append(named)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def libraries(monkeypatch):
    """TensorBoard and W&B as stand-ins, taken for installed."""
    tensorboard, wandb = types.ModuleType("torch.utils.tensorboard"), Wandb()
    tensorboard.SummaryWriter = Writer
    Writer.failing, Writer.made, Writer.scalars = False, 0, []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    return wandb


@pytest.fixture
def recipe(tmp_path):
    return str(write_recipe(tmp_path, checkpoint={"interval": 3}))


def test_every_observer_may_fail_and_the_run_is_none_the_worse(tmp_path, recipe, libraries, monkeypatch, capsys):
    """All at once: TensorBoard's disk, W&B, the timeline, the display, goodput; files that turn into directories."""
    on = ["--log.tensorboard", "true", "--log.wandb", "true", "--train.profile", "[2, 3]"]
    assert main([recipe, "--run.dir", str(tmp_path / "calm")]) == FINISHED
    run = tmp_path / "run"
    for name in ("loss.png", "events.jsonl"):
        (run / name / "in the way").mkdir(parents=True)
    (run / "profile").write_text("a file where a folder should be")
    (run / "timeline").write_text("")
    Writer.failing = True
    monkeypatch.setattr(libraries, "log", fail, raising=False)
    monkeypatch.setattr(observers.ProgressDisplay, "show", fail)
    monkeypatch.setattr(observers, "describe_goodput", fail)
    monkeypatch.setattr(observers, "account", lambda *arguments: 1)
    capsys.readouterr()
    assert main([recipe, *on]) == FINISHED
    log = (run / "log" / "rank_00000.log").read_text()
    for name in (
        "TensorBoard",
        "Weights & Biases",
        "progress display",
        "profiler",
        "effective training time",
        "loss.png",
    ):
        assert log.count(f"{name} failed (") == 1, f"{name} is told once\n{log}"
    assert log.count("events.jsonl cannot be written") == 1 and "Traceback" not in capsys.readouterr().err
    assert libraries.finished == 1, "what failed before is closed all the same"
    names = [sorted(path.name for path in (tmp_path / each / "checkpoints").iterdir()) for each in ("calm", "run")]
    assert names[0] == names[1] == ["step_00000003", "step_00000006"]
    weights = [
        (tmp_path / each / "checkpoints/step_00000006/rank_00000.safetensors").read_bytes() for each in ("calm", "run")
    ]
    assert weights[0] == weights[1]


def test_the_first_error_is_the_one_that_is_seen(tmp_path, recipe, libraries, monkeypatch, capsys):
    """A fault of the training stays the fault, whatever fails after it, and everything else is closed."""
    real = Trainer.step

    def broken(self, *arguments, **named):
        if self.optimizer.step_count == 2:
            raise ZeroDivisionError("the training's own")
        return real(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "step", broken)
    monkeypatch.setattr(observers, "draw_loss", fail)
    monkeypatch.setattr(libraries, "finish", fail, raising=False)
    monkeypatch.setattr(observers.Recorder, "close", fail)
    assert main([recipe, "--log.wandb", "true"]) == FAULT
    assert "ZeroDivisionError: the training's own" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([recipe]) == FINISHED, "the run directory is free, and the run goes on"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_the_training_raises_passes_through_its_observers(error):
    guard, left = Guard("rank 0"), []

    @contextlib.contextmanager
    def watching():
        try:
            yield
        except BaseException as seen:
            left.append(type(seen))
            raise ValueError("an observer's own") from seen

    with pytest.raises(error), guard.around("watching", watching):
        raise error
    assert left == [error]


def test_an_observer_that_swallows_or_breaks_changes_nothing():
    guard, ran = Guard("rank 0"), []
    with pytest.raises(LookupError), guard.around("swallows", lambda: contextlib.suppress(LookupError)):
        raise LookupError
    with guard.around("cannot enter", fail):
        ran.append(1)
    assert ran == [1]


def test_what_fails_is_told_once(monkeypatch):
    said = []
    monkeypatch.setattr(observers.log, "warning", lambda line, *values: said.append(line % values))
    guard = Guard("rank 3")
    assert [guard.call("pictures", fail), guard.call("pictures", fail), guard.call("pictures", len, [1])] == [
        None,
        None,
        1,
    ]
    assert said == ["rank 3: pictures failed (OSError: [Errno 28] No space left on device); training goes on"]


def metrics(step, **more):
    numbers = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64 * step, "step_seconds": 0.1}
    numbers |= {"tokens_per_second": 640.0, "tflops_per_device": 0.1, "mfu": None, "memory_gib": 1.0}
    return StepMetrics(
        step=step,
        **numbers | {"validation_loss": None, "save_stall_seconds": 0.0, "skipped_samples": 0, "rollbacks": 0} | more,
    )


def test_further_metrics_go_everywhere_under_their_own_names(tmp_path, libraries):
    config = build_config({"run": {"dir": str(tmp_path)}, "log": {"wandb": True, "tensorboard": True}})
    made = Observers(config, Mesh(), EventLog(tmp_path, 0))
    made.begin(0, 10)
    made.report(metrics(1, extra={"accuracy": 0.75, "kl": math.nan}))
    made.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["accuracy"] == 0.75 and row["kl"] is None and "extra" not in row
    assert ("accuracy", 0.75, 1) in Writer.scalars and libraries.logged[0][1]["accuracy"] == 0.75
    with pytest.raises(ValueError, match="loss"):
        metrics(1, extra={"loss": 1.0})


def test_wandb_is_one_run_for_all_starts(tmp_path, recipe, libraries):
    for steps in ("2", "4", "6"):
        assert main([recipe, "--log.wandb", "true", "--train.stop_after", steps]) == FINISHED
    assert len({each["id"] for each in libraries.started}) == 1 and len(libraries.started) == 3
    assert all(each["resume"] == "allow" for each in libraries.started)
    assert [step for step, _ in libraries.logged] == [1, 2, 3, 4, 5, 6]
    (tmp_path / "run_id").write_text("../../not an id\n")
    assert kept_id(tmp_path / "run_id") == kept_id(tmp_path / "run_id") != "../../not an id"


def test_wandb_without_credentials_is_found_by_check(tmp_path, recipe, libraries, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([recipe, "--check", "--log.wandb", "true"]) == 2
    assert "log.wandb = true needs an API key for api.wandb.ai" in capsys.readouterr().err
    config = build_config({"log": {"wandb": True}})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    require_credentials(config, {"HOME": str(tmp_path)})
    with pytest.raises(UserError, match=r"wandb\.example\.org"):
        require_credentials(config, {"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org:8080"})
    (tmp_path / ".netrc").write_text("machine\x00{")
    with pytest.raises(UserError):
        require_credentials(config, {"HOME": str(tmp_path)})
    require_credentials(config, {"HOME": str(tmp_path), "WANDB_MODE": "offline"})


def test_tensorboard_is_taken_up_again_after_a_while(tmp_path, libraries, monkeypatch):
    monkeypatch.setattr(trackers, "_RETRY_SECONDS", 0.0)
    board = trackers.TensorBoard(tmp_path / "tensorboard", 1)
    Writer.failing = True
    with pytest.raises(OSError, match="No space"):
        board.write(1, {"loss": 2.0})
    Writer.failing = False
    board.write(2, {"loss": 1.0})
    board.close()
    assert Writer.scalars == [("loss", 1.0, 2)] and Writer.made == 2


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    config = build_config({"run": {"dir": str(tmp_path / "run")}, "log": {"tensorboard": False}})
    made = Observers(config, Mesh(), EventLog(tmp_path / "run", 0))
    made.begin(0, 10)
    made.report(metrics(1))
    shutil.rmtree(tmp_path / "run")
    made.report(metrics(2))
    made.event("stop", code=0)
    made.close()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2]
    assert (tmp_path / "run" / "events.jsonl").exists()


def test_a_start_reads_the_end_of_long_metrics_only(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps(metrics(step, time=1e9 + step).row()) + "\n")
    config = build_config({"run": {"dir": str(tmp_path)}, "log": {"tensorboard": False}})
    made, parsed = Observers(config, Mesh(), EventLog(tmp_path, 0)), itertools.count()
    real = observers.MetricsFile.rewind.__globals__["whole"]
    monkeypatch.setitem(observers.MetricsFile.rewind.__globals__, "whole", lambda value: (next(parsed), real(value))[1])
    made.begin(19_990, 30_000)
    assert next(parsed) < 50
    made.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 19_991))
    lost = json.loads((tmp_path / "events.jsonl").read_text())
    assert lost["steps"] == 10 and lost["seconds"] == pytest.approx(1.0) and lost["until"] == 1e9 + 20_000


def test_a_batch_with_nothing_to_learn_has_no_loss(tmp_path, capsys):
    """Documents that end everywhere, and their ends are masked: no label counts."""
    with IndexedWriter(tmp_path / "ends", np.uint16) as writer:
        writer.add_document(np.zeros(3000, np.uint16))
        writer.finish()
    tokenizer = ["--data.tokenizer", "", "--data.train", json.dumps([str(tmp_path / "ends")])]
    recipe = str(write_recipe(tmp_path))
    real = task.Reader.read

    def ignoring(self, first, samples):
        batches = real(self, first, samples)
        for batch in batches:
            batch.labels_BS.fill_(-100)
        return batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task.Reader, "read", ignoring)
        assert main([recipe, *tokenizer, "--train.steps", "2"]) == FINISHED
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["loss"], row["tokens"]) for row in rows] == [(None, 0.0), (None, 0.0)]
    assert "step 1: nothing to learn in samples 0 to 3" in capsys.readouterr().err


def test_the_final_loss_is_no_single_batch():
    losses = [3.0] * 900 + [2.0, 4.0] * 49 + [2.0, 100.0]
    trained, checked = final_losses(losses, [None, 2.5, None, 2.25, None])
    assert checked == 2.25 and trained == pytest.approx(sum(losses[-20:]) / 20)
    assert all(map(math.isnan, final_losses([None, None], [])))
    assert torch.tensor(final_losses([1.0], [])).tolist()[0] == 1.0
