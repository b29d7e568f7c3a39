"""The committed counts of memory passes and of launches are those of the code; a layer's stay below their goal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def counts(name, folder):
    """What the script `name` wrote here, and what is committed of it."""
    output = folder / "counts.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    committed = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(output.read_text()), json.loads(committed.read_text())


def test_a_layers_launches_are_the_committed_ones(tmp_path):
    counted, committed = counts("launches", tmp_path)
    for recompute, layer in counted["now"].items():
        for field in ("launches", "autograd_nodes"):
            now = committed["now"][recompute][field]
            assert layer[field] == now, f"{field}: run benchmarks/launches.py again, and see docs/throughput.md"
        assert layer["launches"] <= committed["before"][recompute]["launches"] - 6


def test_a_tokens_launches_are_the_committed_ones(tmp_path):
    counted, committed = counts("token_launches", tmp_path)
    for kind, token in counted["now"].items():
        assert token == committed["now"][kind], "run benchmarks/token_launches.py again, and see docs/generation.md"


def test_a_layers_bytes_outside_products_are_the_committed_ones(tmp_path):
    counted, committed = counts("memory_passes", tmp_path)
    for recompute, layer in counted["now"].items():
        before, now = committed["before"][recompute], committed["now"][recompute]
        remedy = "run benchmarks/memory_passes.py again, with --before, and see docs/throughput.md"
        for field in ("gb_outside_products", "gb_of_products", "gb_kept"):
            assert layer[field] == pytest.approx(now[field], rel=0.01), f"{field}: {remedy}"
        assert layer["gb_outside_products"] < before["gb_outside_products"] - 2.9
        assert layer["gb_kept"] <= before["gb_kept"]
        assert layer["gb_outside_products"] < 4.5
