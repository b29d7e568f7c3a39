"""`python -m megalite.train`, alone and under torchrun: what a run leaves behind, the same losses in every layout,
resuming, and mistakes answered in one line."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]

FIELDS = {
    "step", "loss", "grad_norm", "lr", "tokens", "step_seconds", "tokens_per_second", "tflops_per_device", "mfu",
    "memory_gib", "validation_loss", "save_stall_seconds", "skipped_samples", "rollbacks",
    "optimizer_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe and random tokens, 50 of them; one prefix holds a token more than the model knows."""
    path = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng()
    for name, vocabulary in (("tokens", 50), ("foreign", 51), ("cut", 50)):
        with IndexedWriter(path / name, np.uint16) as writer:
            for _ in range(30):
                writer.add_document(np.append(rng.integers(0, 50, rng.integers(50, 200)), vocabulary - 1))
            writer.finish()
    short = path / "cut.bin"
    short.write_bytes(short.read_bytes()[:-40])
    (path / "recipe.toml").write_text(f"""
run.device = "cpu"
model = {{ layers = 3, hidden_size = 24, heads = 6, kv_heads = 3, ffn_hidden_size = 32, vocab_size = 50 }}
data.train = ["{path}/tokens"]
data.split = [80, 20]
optimizer = {{ lr = 3e-3, eps = 1e-5, warmup_steps = 2 }}
[train]
steps = 6
seq_length = 12
micro_batch_size = 2
global_batch_size = 8
precision = "fp32"
eval_interval = 3
eval_samples = 10
""")
    return path


def call(folder, *arguments, processes=1, name="run"):
    command = [sys.executable, "-m", "megalite.train"]
    if processes > 1:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
        command = [sys.executable, "-m", *launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", "megalite.train"]
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}
    arguments = ("--run.dir", str(folder / name), *arguments)
    return subprocess.run(
        [*command, str(folder / "recipe.toml"), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def metrics(folder, name="run"):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(folder):
    """One process, the whole plan."""
    done = call(folder)
    assert done.returncode == 0, done.stderr
    return metrics(folder)


def test_what_a_run_leaves_behind(folder, alone):
    run = folder / "run"
    assert [row["step"] for row in alone] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() >= FIELDS for row in alone)
    assert [row["tokens"] for row in alone] == [96 * step for step in range(1, 7)]
    assert [row["validation_loss"] is not None for row in alone] == [False, False, True, False, False, True]
    assert alone[0]["mfu"] is None
    assert tomllib.loads((run / "config.toml").read_text())["model"]["kv_heads"] == 3
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "step_00000006").is_dir()
    assert list((run / "log").iterdir())
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.tmp"))


def test_a_finished_run_is_left_alone(folder, alone):
    again = call(folder)
    assert again.returncode == 0, again.stderr
    assert metrics(folder) == alone


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, ["--parallel.tensor", "2"]),
        (4, ["--parallel.pipeline", "2"]),
        pytest.param(4, ["--parallel.tensor", "2", "--parallel.pipeline", "2"], marks=pytest.mark.slow),
        pytest.param(3, ["--parallel.pipeline", "3"], marks=pytest.mark.slow),
    ],
)
def test_torchrun_gives_the_losses_of_one_process(folder, alone, processes, layout):
    name = "layout" + "".join(layout).replace("--", "-")
    done = call(folder, *layout, processes=processes, name=name)
    assert done.returncode == 0, done.stderr
    rows = metrics(folder, name)
    for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
        values = [row[key] for row in alone]
        for row, value in zip(rows, values, strict=True):
            assert row[key] == (value if value is None else pytest.approx(value, rel=1e-5)), key
    assert len(list((folder / name / "log").glob("rank_*.log"))) == processes


def test_stopped_and_resumed_is_the_run_that_was_not(folder, alone):
    first = call(folder, "--train.stop_after", "3", name="halves")
    assert first.returncode == 0, first.stderr
    assert [row["step"] for row in metrics(folder, "halves")] == [1, 2, 3]
    second = call(folder, name="halves")
    assert second.returncode == 0, second.stderr
    for row, whole in zip(metrics(folder, "halves"), alone, strict=True):
        assert all(row[key] == whole[key] for key in ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modle.layers", "2"], "did you mean"),
        (["--model.kv_heads", "4"], "model.kv_heads = 4"),
        (["--parallel.tensor", "2"], "parallel.tensor = 2"),
        (["--data.train", '["nowhere"]'], "nowhere"),
        (["--data.train", "CUT"], "cut"),
        (["--data.train", "FOREIGN"], "50"),
        (["--model.vocab_size", "49"], "49"),
        (["--train.seq_length", "100000"], "train.seq_length = 100000"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_one_line(folder, arguments, words):
    """Exit 2, the field or file and its value, no traceback, no checkpoint of a run that never was."""
    places = {"CUT": f'["{folder}/cut"]', "FOREIGN": f'["{folder}/foreign"]'}
    done = call(folder, *(places.get(argument, argument) for argument in arguments), name="mistake")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(folder.glob("mistake/checkpoints/step_*"))


def test_a_missing_recipe_is_one_line(folder):
    done = subprocess.run(
        [sys.executable, "-m", "megalite.train", str(folder / "nothing.toml")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "nothing.toml" in done.stderr and "Traceback" not in done.stderr
