"""Loss spikes and refused steps: seen, rolled back, their data left out, and the run ends as if they had not been."""

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.config import build_config
from megalite.data.batch import Batch
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.errors import FAULT, FINISHED
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.__main__ import main
from megalite.train.inputs import open_data
from megalite.train.loop import MAX_REFUSED_STEPS
from megalite.train.recovery import MINIMUM, WINDOW, SpikeDetector, next_sample, skip_range, unearned
from megalite.train.trainer import Trainer

SEQUENCE, BATCH, STEPS, BAD_STEP = 32, 4, 90, 70
DOCUMENT, PATTERN = SEQUENCE, 200  # every sample is one document, and the first token of the next


RECOMMENDED = 5.0


def replay(losses, threshold=RECOMMENDED, start=()):
    """Positions at which spikes are found in a sequence of losses, each as (position, steps that it lasted)."""
    detector, found = SpikeDetector(threshold, start, lr=1.0), []
    for position, loss in enumerate(losses):
        if lasted := detector.spike_steps(float(loss), 1.0):
            found.append((position, lasted))
    return found


@pytest.mark.fast
def test_detector_sees_a_jump_and_keeps_it_out_of_its_window():
    noise = random.Random(3)
    detector = SpikeDetector(RECOMMENDED)
    for step in range(300):
        assert not detector.spike_steps(5.0 - step / 100 + noise.gauss(0, 0.05), 1.0)
    window = list(detector.losses)
    assert len(window) == WINDOW and detector.spike_steps(3.5, 1.0) == 0
    assert detector.spike_steps(3.5, 1.0) == 2 and detector.losses == [*window[1:], 3.5]


@pytest.mark.fast
def test_detector_waits_for_enough_losses_and_can_be_off():
    for count, found in ((MINIMUM - 1, []), (MINIMUM, [(MINIMUM + 1, 2)])):
        assert replay([2.0] * count + [50.0] * 2) == found
    assert not any(SpikeDetector(0.0, [1.0] * WINDOW).spike_steps(1e9, 1.0) for _ in range(3))


@pytest.mark.fast
def test_detector_ignores_ripples_one_high_loss_and_values_that_are_not_finite():
    calm = [2.0] * WINDOW
    assert not replay([2.04] * 5, start=calm)
    assert replay([2.06, 2.06], start=calm) == [(1, 2)]
    assert not replay([9.0, 2.0, 2.0, 9.0, 2.0], start=calm)
    assert not replay([math.nan] * 5, start=calm)


@pytest.mark.fast
def test_a_learning_rate_that_is_put_up_makes_the_losses_before_no_measure():
    detector = SpikeDetector(RECOMMENDED, [2.0] * WINDOW, lr=1e-4)
    assert not any(detector.spike_steps(3.0, 1e-3) for _ in range(5)) and len(detector.losses) == 5
    falling = SpikeDetector(RECOMMENDED, [2.0] * WINDOW, lr=1e-3)
    assert [falling.spike_steps(3.0, lr) for lr in (9e-4, 8e-4)] == [0, 2]


def recorded():
    """Losses of tiny models trained by megalite, and made-up ones with tails that no training has."""
    with np.load(Path(__file__).parents[1] / "fixtures" / "losses.npz") as file:
        for name in file.files:
            yield name, file[name] / 1000  # kept as whole thousandths
    rng, steps = np.random.default_rng(5), np.arange(4000)
    course = 2 + 8 * np.exp(-steps / 200)
    yield "normal", course + rng.normal(0, 0.05, 4000)
    yield "student-t, 3", course + 0.1 * rng.standard_t(3, 4000)
    yield "student-t, 1.5", course + 0.1 * rng.standard_t(1.5, 4000)
    yield "pareto, 1.5", course + np.minimum(0.1 * rng.pareto(1.5, 4000), 7.0)
    yield "lognormal", course * np.exp(rng.normal(0, 0.6, 4000))
    yield "noise that grows", course + rng.normal(0, 0.05, 4000) * (1 + steps / 1000)
    for share in (0.003, 0.01, 0.1, 0.3):
        hard = np.where(rng.random(4000) < share, 5 * rng.uniform(0.5, 1.5, 4000), 0.0)
        yield f"a hard source with share {share}", course - 1.5 + hard + rng.normal(0, 0.05, 4000)


SEQUENCES = dict(recorded())


@pytest.mark.fast
@pytest.mark.parametrize("name", SEQUENCES)
def test_healthy_runs_are_left_alone_and_every_planted_spike_is_found(name):
    """At the recommended threshold. Planted are ten standard deviations of the noise, for three steps."""
    losses = SEQUENCES[name]
    assert replay(losses) == []
    for start in range(WINDOW, len(losses) - 3, len(losses) // 40):
        before = losses[start - WINDOW : start]
        spike = losses[start : start + 3] + 10 * np.std(np.diff(before)) / math.sqrt(2)
        assert replay(spike, start=before), f"at {start}"


@pytest.mark.fast
def test_rollbacks_are_earned_back_by_progress():
    assert unearned([50, 400, 1300], 1400, rollback_steps=100) == [400, 1300]
    assert unearned([50, 400, 1300], 1401, rollback_steps=100) == [1300]
    assert unearned([50], 150, rollback_steps=0) == [50] and unearned([50], 151, rollback_steps=0) == []


@pytest.mark.fast
@pytest.mark.parametrize("skip_steps", [0, 1, 2, 7])
def test_skipped_range_covers_the_spike_and_begins_after_the_checkpoint(skip_steps):
    for spike in range(80, 200, 8):
        first, stop = skip_range(spike, 8, skip_steps, 80)
        assert 80 <= first <= spike and stop >= spike + 8
        assert stop - first >= skip_steps * 8
        assert next_sample(spike, [(first, stop)]) == stop
        assert skip_range(spike, 8, skip_steps, 80, stop + 16) == (first, stop + 16), "all that was read of the spike"


@pytest.mark.fast
def test_ranges_that_touch_are_passed_together():
    assert next_sample(10, [(20, 30), (10, 20), (40, 50)]) == 30
    assert next_sample(9, [(10, 20)]) == 9


def write_corpus(prefix, documents):
    """Documents that begin with their number in two tokens and go on with a pattern that a model learns at once."""
    rng = np.random.default_rng(7)
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            phase = rng.integers(PATTERN)
            body = (phase + np.arange(DOCUMENT - 2) * 3) % PATTERN
            writer.add_document(np.concatenate([[256 + number // 100, 384 + number % 100], body]).astype(np.uint16))
        writer.finish()


def arguments(tmp_path, **overrides):
    settings = {
        "run.dir": tmp_path / "run",
        "data.train": json.dumps([str(tmp_path / "corpus")]),
        "data.cache_dir": tmp_path / "cache",
        "model.layers": 2,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 64,
        "model.heads": 2,
        "model.vocab_size": 512,
        "model.max_positions": 64,
        "train.seq_length": SEQUENCE,
        "train.micro_batch_size": BATCH,
        "train.global_batch_size": BATCH,
        "train.steps": STEPS,
        "train.precision": "fp32",
        "optimizer.lr": 1e-2,
        "optimizer.warmup_steps": 5,
        "checkpoint.interval": 10,
        "checkpoint.keep": 0,
        "log.tensorboard": "false",
    } | overrides
    return [text for field, value in settings.items() for text in (f"--{field}", str(value))]


def spoil(tmp_path, step):
    """Overwrite the documents that the given step reads with random tokens."""
    sections: dict = {}
    for field, value in zip(*[iter(arguments(tmp_path))] * 2):
        section, name = field[2:].split(".")
        with_json = json.loads(value) if value[0] in "[{" or value.replace(".", "").isdigit() else value
        sections.setdefault(section, {})[name] = with_json
    sections["log"] = {"tensorboard": False}
    dataset, _ = open_data(build_config(sections))
    bad = set()
    for sample in range((step - 1) * BATCH, step * BATCH):
        tokens = dataset[sample]
        places = np.flatnonzero((tokens[:-1] >= 256) & (tokens[:-1] < 384) & (tokens[1:] >= 384))
        bad |= {int(tokens[place] - 256) * 100 + int(tokens[place + 1] - 384) for place in places}
    assert bad
    body = np.memmap(tmp_path / "corpus.bin", np.uint16, "r+")
    for number in bad:
        body[number * DOCUMENT + 2 : (number + 1) * DOCUMENT] = np.random.default_rng(number).integers(
            0, 256, DOCUMENT - 2
        )
    body.flush()
    assert len(IndexedDataset(tmp_path / "corpus")) > max(bad)


def metrics(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_spike_from_bad_data_is_rolled_back_and_its_data_left_out(tmp_path, kind):
    clean, dirty = tmp_path / "clean", tmp_path / "dirty"
    for folder in (clean, dirty):
        folder.mkdir()
        write_corpus(folder / "corpus", STEPS * BATCH + 40)
    for step in range(BAD_STEP, BAD_STEP + 3):
        spoil(dirty, step)
    recovery = {
        "recovery.spike_threshold": RECOMMENDED,
        "recovery.rollback_steps": 15,
        "recovery.skip_steps": 6,
        "recovery.max_rollbacks": 2,
        "optimizer.kind": kind,
    }
    assert main(arguments(clean, **recovery)) == FINISHED
    assert main(arguments(dirty, **recovery)) == FINISHED
    calm, rows = metrics(clean), metrics(dirty)
    assert calm[-1]["rollbacks"] == 0 and calm[-1]["skipped_samples"] == 0
    assert rows[-1]["rollbacks"] == 1 and rows[-1]["skipped_samples"] == 6 * BATCH
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "steps that were given up are no longer listed"
    assert max(row["loss"] for row in rows[BAD_STEP - 20 :]) < 2 * max(row["loss"] for row in calm[BAD_STEP - 20 :])
    assert abs(rows[-1]["loss"] - calm[-1]["loss"]) < 0.15
    assert rows[59]["loss"] == calm[59]["loss"], "before the spike both runs are the same"
    assert "back to step 50" in (dirty / "run" / "log" / "rank_00000.log").read_text()


def test_spikes_without_end_are_a_fault_not_a_loop(tmp_path, capsys):
    write_corpus(tmp_path / "corpus", STEPS * BATCH + 40)
    for step in range(BAD_STEP, STEPS):
        spoil(tmp_path, step)
    limits = {"recovery.spike_threshold": RECOMMENDED, "recovery.skip_steps": 1, "recovery.max_rollbacks": 1}
    assert main(arguments(tmp_path, **limits)) == FAULT
    assert "after 1 rollback not earned back" in capsys.readouterr().err


@pytest.mark.fast
def test_step_that_is_not_finite_changes_nothing():
    config = build_config(
        {
            "model": {"layers": 1, "hidden_size": 16, "heads": 2, "vocab_size": 31, "max_positions": 8},
            "train": {"seq_length": 8, "micro_batch_size": 2, "global_batch_size": 2, "precision": "fp32"},
        }
    )
    trainer = Trainer(config, Mesh(), select_kernels({}, torch.device("cpu")))
    trainer.initialise()
    tokens = torch.randint(0, 31, (2, 9))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    assert trainer.step([batch], 1e-3).accepted
    stage = trainer.stages[0]
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    poisoned = stage.layers[0].feed_forward.down.weight
    value = poisoned.data[0, 0].item()
    poisoned.data[0, 0] = math.nan
    result = trainer.step([batch], 1e-3)
    assert not result.accepted and math.isnan(result.loss) and trainer.optimizer.step_count == 1
    poisoned.data[0, 0] = value
    assert all(torch.equal(old, new) for old, new in zip(before, stage.parameters()))


def test_steps_refused_in_a_row_end_the_run_after_its_rollbacks(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path / "corpus", 200)
    real = Trainer.step

    def broken(self, batches, lr, flag=0.0):
        result = real(self, batches, lr, flag)
        return dataclasses.replace(result, accepted=False, loss=math.nan) if self.optimizer.step_count > 12 else result

    monkeypatch.setattr(Trainer, "step", broken)
    few = {"train.steps": 30, "recovery.max_rollbacks": 1, "recovery.rollback_steps": 5, "recovery.skip_steps": 2}
    assert main(arguments(tmp_path, **few)) == FAULT
    assert f"{MAX_REFUSED_STEPS} steps in a row" in capsys.readouterr().err
