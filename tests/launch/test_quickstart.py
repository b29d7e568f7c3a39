"""The quickstart's own part: which text is held out, what it may overwrite, and one whole run on a little text."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import quickstart
from megalite.errors import UserError
from tests.support.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.fast
def test_split_is_disjoint_complete_and_independent_of_order(tmp_path):
    texts = [f"text {number} {random.random()}" for number in range(300)] + ["twice", "twice"]
    (tmp_path / "one").mkdir()
    train, held_out = map(texts_of, quickstart.split(texts, tmp_path / "one"))
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(texts)
    assert len(held_out) == len(set(texts)) // quickstart.HELD_OUT_SHARE
    (tmp_path / "two").mkdir()
    random.shuffle(texts)
    assert [set(texts_of(path)) for path in quickstart.split(texts, tmp_path / "two")] == [set(train), set(held_out)]


@pytest.mark.fast
def test_long_texts_are_cut_at_line_ends_without_loss():
    text = "".join("x" * random.randint(0, 90) + "\n" for _ in range(3000)) + "no end of line"
    parts = list(quickstart.pieces(text))
    assert "".join(parts) == text and len(parts) > 3
    assert all(part.endswith("\n") and len(part) >= quickstart.LONGEST_PIECE for part in parts[:-1])


@pytest.mark.fast
def test_the_standard_library_is_there_and_has_no_tests():
    texts = quickstart.documents(None)
    assert sum(map(len, texts)) > 5e6
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("import unittest\nfrom test import support" in text for text in texts)


@pytest.mark.fast
def test_foreign_files_are_not_cleared(tmp_path):
    out = tmp_path / "out"
    quickstart.clear(out)
    (out / "metrics.jsonl").write_text("old")
    quickstart.clear(out)
    assert sorted(path.name for path in out.iterdir()) == ["data", quickstart.MARKER]
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no quickstart made"):
        quickstart.clear(foreign)
    assert (foreign / "chapter.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        quickstart.clear(foreign / "chapter.tex")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "x"], "--steps: 'x' is not a whole number from 1 to"),
        (["--processes", "0"], "--processes: '0' is not a whole number from 1 to"),
        (["--device", "tpu"], "--device: 'tpu' is not one of auto, cpu, cuda"),
        (["--model.layrs", "2"], "did you mean"),
        (["--stepz", "2"], "--stepz is unknown; did you mean --steps"),
    ],
)
def test_mistakes_are_one_line_before_any_work(arguments, message):
    with pytest.raises(UserError, match=message):
        quickstart.parse(arguments)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_request_reaches_the_stage_and_nobody_is_left_behind(tmp_path, number, code):
    """Of a stage that saves and leaves in order, and takes its time."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def leave(number, frame):\n"
        "    time.sleep(1)\n"
        "    (here / 'saved').touch()\n"
        "    sys.exit(75 if number == signal.SIGTERM else 130)\n"
        "for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, leave)\n"
        "(here / 'running').touch()\n"
        "while True: time.sleep(0.1)\n"
    )
    program = f"from launch import stages; stages.run('one', 'python', {str(stage)!r})"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not (tmp_path / "running").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE_SECONDS) == code
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_from_the_users_text_to_a_sample(tmp_path):
    source = Path(subprocess.__file__).parent
    files = [
        str(source / name) for name in ("subprocess.py", "argparse.py", "typing.py", "inspect.py", "_pydecimal.py")
    ]
    out = tmp_path / "run"
    small = ["--model.layers", "2", "--model.hidden_size", "64", "--train.seq_length", "64"]
    command = [sys.executable, str(ROOT / "launch/quickstart.py"), "--out", str(out), "--device", "cpu", "--steps", "4"]
    done = subprocess.run([*command, "--input", *files, *small], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / quickstart.MARKER).read_text())
    assert 0 < results["bits_per_byte"] < 9 and results["sample"].strip()
    assert (out / "loss.png").stat().st_size > 1000
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    assert "tensor 2" in done.stderr + done.stdout and "pipeline 2" in done.stderr + done.stdout
