"""The kernels compiled for sm_80, sm_89, sm_90 and sm_100 without a GPU, in a process of their own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def matrix(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_matrix", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


def test_hopper_norms_and_attention_forward() -> None:
    """The quick part: no spills, shared memory under the limit, wgmma in the attention."""
    result = matrix("--quick")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "wgmma.mma_async" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_on_every_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel, mask and head width; the table is printed, and the committed one names the same configurations."""
    result = matrix("--json", str(tmp_path / "compiled.json"))
    with capsys.disabled():
        print(f"\n{result.stdout}")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-4000:]
    committed, made = (
        {(row["target"], row["case"]) for row in json.loads(path.read_text())["rows"]}
        for path in (ROOT / "benchmarks" / "results" / "kernels_compiled.json", tmp_path / "compiled.json")
    )
    assert made == committed, "write benchmarks/results/kernels_compiled.json again: compile_matrix --json"
