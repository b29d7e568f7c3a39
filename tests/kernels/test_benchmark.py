"""The kernels' benchmark runs to its end: on this CPU, and the GPU's way rehearsed in the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def check(document: dict) -> None:
    """Whatever a row claims follows from its times; nothing is left out without a reason."""
    for result in document["results"]:
        ours, *peers = result["seconds"]
        assert ours == result["ours"] and ours.startswith("megalite ")
        times = result["seconds"][ours]
        assert 0 < times["p20"] <= times["median"] <= times["p80"]
        assert set(result["times_faster_than"]) == set(peers)
        for rate, limit, share in (
            ("bytes_per_second", "copy_bytes_per_second", "of_copy_bandwidth"),
            ("flop_per_second", "matmul_flop_per_second", "of_matmul_rate"),
        ):
            if rate in result:
                assert result[share] == pytest.approx(result[rate] / document[limit])
        assert ("bytes_per_second" in result) != ("flop_per_second" in result)


def test_on_a_cpu(tmp_path: Path) -> None:
    table = run("benchmarks/kernels.py", "--device", "cpu", "--only", "swiglu,adamw", "--samples", "2", "--out",
                str(tmp_path))  # fmt: skip
    document = json.loads((tmp_path / "kernels_cpu_bfloat16.json").read_text())
    check(document)
    assert [r["case"] for r in document["results"]] == ["swiglu forward", "swiglu backward", "adamw", "square_sum"]
    assert document["results"][0]["absent"] == ["torch.compile"] and "megalite reference" in table
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"kernels_cpu_bfloat16.{kind}" for kind in ("json", "txt", "png")}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_way_of_a_gpu_session(tmp_path: Path) -> None:
    """All groups with every peer at hand; one that fails is named with its reason and the run goes on."""
    run("-m", "tests.kernels.benchmark_rehearsal", str(tmp_path), TRITON_INTERPRET="1")
    document = json.loads((tmp_path / "kernels_rehearsal.json").read_text())
    check(document)
    results = {result["case"]: result for result in document["results"]}
    assert len(results) == len(document["results"]) == 37
    assert all(result["ours"].startswith("megalite triton") and "peak_bytes" in result for result in results.values())
    assert "Liger-Kernel" in results["rms_norm backward"]["times_faster_than"]
    assert "Liger-Kernel (RuntimeError: no such kernel on this device)" in results["add_rms_norm forward"]["absent"]
    attention = results["attention causal s16 d16 backward"]
    assert {"SDPA default", "SDPA flash", "flash-attn"} <= attention["times_faster_than"].keys()
    assert any(reason.startswith("SDPA cuDNN (RuntimeError") for reason in attention["absent"])  # a CPU has none
    assert document["clocks"].keys() == {"before", "after"}


@pytest.mark.slow
def test_a_failed_row_of_the_training_benchmark_is_a_row_with_an_error(tmp_path: Path) -> None:
    """The other rows' numbers stay; they are written after every turn. On a machine without tyro."""
    bad, good = "megalite,precision=bf16,recompute=never", "megalite,precision=bf16"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests/kernels/bare")}
    command = ["benchmarks/train.py", "--rows", bad, good, "plain,precision=bf16", "--layers", "1", "--rounds", "1"]
    command += ["--steps", "1", "--warmup", "0", "--device", "cpu", "--output", str(tmp_path / "train.json")]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 1 and f"{bad}: failed" in result.stdout, result.stdout + result.stderr
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert "train.recompute = 'never'" in rows[bad]["error"] and "seconds_per_step" not in rows[bad]
    assert rows[good]["tokens_per_second"] > 0 and list(rows[good]["faster_than"]) == ["plain,precision=bf16"]
    assert rows[good]["first_loss"] == pytest.approx(9.0, abs=0.3)  # ln(8192) = 9.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "rmsnorm"), "no such group; known: rms_norm"),
        (("--samples", "1"), "at least 2"),
        (("--device", "cuda"), "use --device cpu"),
    ],
)
def test_mistakes_are_one_line(arguments, words, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    spec = importlib.util.spec_from_file_location("kernels_benchmark", ROOT / "benchmarks" / "kernels.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
