"""On one machine nothing listens beyond the loopback interface, whatever is started: seen in /proc/net."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import is_loopback, sockets_of
from tests.support.tiny import write_recipe

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
LOCAL = ["bash", "launch/local.sh"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("job"), parallel={"tensor": 2})


def sockets(recipe, *command):
    """What listened while the command ran to its good end."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "_IFNAME"))}
    log = recipe.parent / "said"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT, env=environment | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
            stdout=file, stderr=file, text=True,
        )  # fmt: skip
        try:
            seen = sockets_of(process, 300)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, log.read_text()
    return seen


def train(recipe, number=0):
    return [*LOCAL, recipe, "--run.dir", recipe.parent / f"run{number}"]


def programs(recipe):
    """The programs over a trained model, and their layout on two ranks."""
    checkpoint = ["--checkpoint", recipe.parent / "run", "--parallel.tensor", "2"]
    data = ["--data", recipe.parent / "tokens", "--seq-length", "16", "--max-samples", "8"]
    return {
        "doctor": ["tools/doctor.py", "--preflight", recipe],
        "generate": ["tools/generate.py", *checkpoint, "--prompt-ids", "[1,2,3]", "--max-new-tokens", "4"],
        "evaluate": ["tools/evaluate.py", "loss", *checkpoint, *data],
    }


def assert_loopback_only(seen):
    assert [address for address in seen if not is_loopback(address)] == []
    assert seen, "two ranks talk to each other"


def test_local_training_and_programs(recipe):
    assert_loopback_only(sockets(recipe, *LOCAL, recipe))
    for name in ("doctor", "generate"):
        assert_loopback_only(sockets(recipe, *LOCAL, *programs(recipe)[name], "--processes", "2"))


def test_one_process_listens_nowhere(recipe):
    seen = sockets(recipe, sys.executable, "-m", "megalite.train", recipe, "--parallel.tensor", "1",
                   "--run.dir", recipe.parent / "alone")  # fmt: skip
    assert not seen


def test_under_torchrun_only_its_agent_listens_elsewhere(recipe):
    seen = sockets(recipe, *TORCHRUN, "-m", "megalite.train", recipe, "--run.dir", recipe.parent / "torchrun")
    beyond = {command for address, command in seen.items() if not is_loopback(address)}
    assert len(seen) > len(beyond) and all("torch.distributed.run" in command for command in beyond), seen


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["train", "doctor", "generate", "evaluate"])
def test_every_start(recipe, name, number):
    if not (recipe.parent / "run").exists():
        assert_loopback_only(sockets(recipe, *LOCAL, recipe))
    words = train(recipe, number) if name == "train" else [*LOCAL, *programs(recipe)[name], "--processes", "2"]
    assert_loopback_only(sockets(recipe, *words))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_quickstart(recipe, number):
    source = Path(subprocess.__file__).parent
    small = ["--model.layers", "2", "--model.hidden_size", "64", "--train.seq_length", "64", "--steps", "2"]
    files = [source / name for name in ("subprocess.py", "argparse.py", "typing.py", "inspect.py")]
    out = ["--out", recipe.parent / f"quickstart{number}", "--device", "cpu"]
    assert_loopback_only(sockets(recipe, sys.executable, "launch/quickstart.py", *out, *small, "--input", *files))
