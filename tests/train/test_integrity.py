"""A bit flipped on one rank is found, the rank named, the steps made again; the run ends as if undisturbed."""

import json

import pytest
import torch

from megalite.checkpoint.source import CheckpointReader
from megalite.config import load_config
from megalite.errors import RunFailed
from megalite.kernels import select_kernels
from megalite.observe.events import EventLog
from megalite.observe.observers import Observers
from megalite.observe.watch import Watch
from megalite.runtime import StopRequest
from megalite.train.loop import TrainingRun
from megalite.train.replicas import Difference, digest
from megalite.train.start import build_task
from tests.support.chaos import ChaosGroups
from tests.support.parity import Layout, mesh_of
from tests.support.tiny import write_recipe

STEPS, INTERVAL, FLIPPED_AT, GUILTY = 10, 3, 4, 1
FOUND_BY = 6  # the next multiple of the interval


def flip(tensor, bit=12):
    """Flip one bit of one element, in place."""
    words = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    words[len(words) // 3] ^= 1 << bit


def targets(trainer, kind):
    """A flat tensor of this rank to hurt."""
    segment = next(segment for segment in trainer.optimizer.segments if segment.bucket.decays)
    vectors = next(segment for segment in trainer.optimizer.segments if not segment.bucket.decays)
    return {
        "weight": lambda: segment.master.detach(),
        "moment": lambda: segment.state["exp_avg"],
        "copy": lambda: segment.bucket.parameters[segment.bucket.slots[0].stop - 8 :][:8],
        "norm": lambda: vectors.bucket.parameters[:8],
        "gradient": lambda: segment.gradient[segment.gradient.abs().argmax() :][:1],
    }[kind]()


def train(rank, recipe, overrides, world, hurt, every_time):
    """A whole run on one rank of the pool; (its error or "", whether steps were made again)."""
    config = load_config(recipe, overrides)
    mesh = mesh_of(config, rank, world, ChaosGroups(3))
    task = build_task(config, mesh, select_kernels({}, torch.device("cpu")))
    trainer, done = task.trainer, []

    def spoil(kind):
        # A working copy lives until the next update, so it is hurt just before it is compared.
        moment = FOUND_BY if kind == "copy" else FLIPPED_AT
        if rank == GUILTY and hurt == kind and trainer.optimizer.step_count == moment and (every_time or not done):
            done.append(True)
            # Half of the largest gradient, or twice: less may round to the same weight.
            flip(targets(trainer, kind), 23 if kind == "gradient" else 12)

    accumulate, update = trainer.accumulate, trainer.optimizer.rule.update

    def accumulated(*args, **kwargs):
        shares = accumulate(*args, **kwargs)
        for kind in ("weight", "moment", "gradient"):
            spoil(kind)
        return shares

    def updated(*args, **kwargs):
        update(*args, **kwargs)
        for kind in ("copy", "norm"):
            spoil(kind)

    trainer.accumulate, trainer.optimizer.rule.update = accumulated, updated
    events = EventLog(config.run.dir, rank)
    observers, watch = Observers(config, mesh, events), Watch(mesh, config.run.dir, 60.0, events)
    run = TrainingRun(config, mesh, task, StopRequest(), watch, observers, None, None, lambda: None)
    try:
        run.run()
        return ""
    except RunFailed as error:
        return str(error)
    finally:
        observers.close()


def weights(folder):
    path = folder / "run/checkpoints" / f"step_{STEPS:08d}"
    with CheckpointReader(path) as reader:
        reader.verify()
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def events(folder, kind):
    lines = map(json.loads, (folder / "run/events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


CASES = [
    ("weight", Layout(data=2, zero=1), "fp32"),
    ("weight", Layout(data=2, zero=3), "bf16"),
    ("moment", Layout(data=2, zero=0), "fp32"),
    ("moment", Layout(data=2, zero=2), "bf16"),
    ("moment", Layout(tensor=2, pipeline=2), "fp32"),
    ("copy", Layout(data=2, zero=0), "bf16"),
    ("norm", Layout(tensor=2), "fp32"),
    ("norm", Layout(tensor=2, sequence=True, data=2, zero=3), "fp32"),
    ("gradient", Layout(data=2, zero=0), "fp32"),
]


def run_twice(pool, tmp_path, layout, precision, hurt, every_time=False):
    """Errors of the hurt run's ranks; the undisturbed run is made too."""
    recipe = str(write_recipe(tmp_path))
    for name, kind in (("calm", ""), ("hurt", hurt)):
        fields = {
            "run.dir": str(tmp_path / name / "run"),
            "train.steps": STEPS,
            "train.precision": precision,
            "checkpoint.interval": INTERVAL,
            "recovery.replica_check_interval": INTERVAL,
            **layout.fields,
        }
        overrides = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        (tmp_path / name).mkdir()
        errors = pool.run(train, layout.world, recipe, overrides, layout.world, kind, every_time)
    return errors


@pytest.mark.parametrize(("hurt", "layout", "precision"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_flipped_bit(pool, tmp_path, hurt, layout, precision):
    assert run_twice(pool, tmp_path, layout, precision, hurt) == [""] * layout.world
    assert weights(tmp_path / "hurt") == weights(tmp_path / "calm"), "the end is not that of the undisturbed run"
    assert not events(tmp_path / "calm", "damaged")
    (damaged,) = events(tmp_path / "hurt", "damaged")
    assert FLIPPED_AT < damaged["step"] <= FOUND_BY
    blamed = {event["rank"] for event in events(tmp_path / "hurt", "flipped_bit")}
    # The other data-parallel rank took its copy of the norm from the guilty one.
    assert blamed == ({GUILTY, GUILTY + 2} if hurt == "norm" and layout.data == 2 else {GUILTY})


def test_a_difference_that_comes_back_is_a_bug(pool, tmp_path):
    errors = run_twice(pool, tmp_path, Layout(data=2, zero=0), "fp32", "gradient", every_time=True)
    assert errors[0] == errors[1] and "differ again" in errors[0] and "ranks 0 against 1" in errors[0]


def test_memory_that_keeps_failing_ends_the_run(pool, tmp_path):
    errors = run_twice(pool, tmp_path, Layout(data=2, zero=1), "fp32", "moment", every_time=True)
    assert "recovery.max_rollbacks" in errors[0] and "rank 1: exp_avg of " in errors[0]


@pytest.mark.fast
def test_digest_sees_every_bit_and_every_move():
    for shape, dtype in (
        ((5, 6), torch.float32),
        ((7, 3), torch.bfloat16),
        ((9,), torch.float32),
        ((4, 8), torch.bfloat16),
    ):
        tensor = torch.randn(shape).to(dtype)
        before = digest(tensor).item()
        padded = torch.zeros(tensor.numel() + 3, dtype=dtype)
        padded[3:] = tensor.flatten()
        assert digest(padded[3:].view(shape)).item() == before, "where it is stored must not matter"
        assert digest(tensor.flip(0)).item() != before
        for bit in range(8 * tensor.element_size()):
            other = tensor.clone()
            flip(other.view(-1), bit)
            assert digest(other).item() != before


@pytest.mark.fast
def test_the_minority_is_suspected():
    assert Difference("w", (0,), {0: 5, 1: 5, 2: 6}).suspects == (2,)
    assert Difference("w", (0,), {0: 5, 1: 6}).suspects == ()
    assert "ranks 0, 1 against 2" in str(Difference("w", (0,), {0: 5, 1: 5, 2: 6}))
