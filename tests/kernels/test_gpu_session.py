"""The script for a GPU machine, rehearsed with everything hidden that such a machine may lack."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megalite.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def bare(*command: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run where neither the packages that tests/kernels/bare hides nor pytest's plugins are there."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests/kernels/bare"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.fast
def test_the_tests_that_need_a_gpu_are_collected_on_a_bare_machine() -> None:
    collect = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider", "tests")
    result = bare(*collect)
    assert result.returncode == 0, result.stdout[-3000:]
    for name in ("suite/test_training_step.py", "suite/test_ops.py", "report/test_profile.py"):
        assert name in result.stdout
    hidden = bare(sys.executable, "-c", "import orjson")
    assert "ModuleNotFoundError" in hidden.stderr, "the machine was not bare"


@pytest.mark.fast
def test_the_stand_in_for_tomli_w_writes_what_is_read_back(tmp_path: Path) -> None:
    script = (
        "import sys; from megalite.config import build_config, to_toml; print(to_toml(build_config("
        "{'data': {'train': [[0.3, 'a \\\\ \"b\"'], [0.7, 'ü']]}, 'model': {'rope_scaling': {'type': 'linear', "
        "'factor': 2.0}}, 'optimizer': {'eps': 1e-8}})), file=open(sys.argv[1], 'w'))"
    )
    path = tmp_path / "config.toml"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/benchmarks/stand_ins:{ROOT}/tests/kernels/bare"}
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True, timeout=100)
    config = load_config(path)
    assert config.data.train == ((0.3, 'a \\ "b"'), (0.7, "ü")) and config.optimizer.eps == 1e-8
    assert config.model.rope_scaling == {"type": "linear", "factor": 2.0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sections_rehearsed_on_a_bare_machine(tmp_path: Path) -> None:
    """Sections stand alone: the second runs and is told of whatever the first did."""
    result = bare("bash", str(SCRIPT), "--device", "cpu", "--budget", "4000", "--out", str(tmp_path), "run", "step",
                  "train", "rollouts", timeout=1700)  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    session = json.loads((tmp_path / "session.json").read_text())
    assert {name: section["exit"] for name, section in session["sections"].items()} == {
        "run": 0, "step": 0, "train": 0, "rollouts": 0,
    }  # fmt: skip
    stages = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert len(stages) == 8 and all(stage["wrong"] is None for stage in stages)
    trained = json.loads((tmp_path / "train_10m.json").read_text())["rows"]
    assert all(row["tokens_per_second"] > 0 for row in trained.values()) and len(trained) == 2
    answered = json.loads((tmp_path / "rollouts.json").read_text())["rows"]
    assert answered.keys() == {"1", "16", "64"} and all(row["tokens_per_second"] > 0 for row in answered.values())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["walk"], "sections are run train"), (["--device", "tpu"], "cuda or cpu"), (["--budget", "x"], "seconds")],
)
def test_mistakes_are_one_line(arguments, words) -> None:
    result = bare("bash", str(SCRIPT), *arguments)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
