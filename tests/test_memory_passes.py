"""The committed counts of memory passes are those of the code, and stay below their goal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks" / "results" / "memory_passes.json"


def test_a_layers_bytes_outside_products_are_the_committed_ones(tmp_path):
    output = tmp_path / "passes.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_passes.py"), "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    committed, counted = json.loads(COMMITTED.read_text()), json.loads(output.read_text())
    for recompute, counts in counted["now"].items():
        before, now = committed["before"][recompute], committed["now"][recompute]
        remedy = "run benchmarks/memory_passes.py again, with --before, and see docs/throughput.md"
        for field in ("gb_outside_products", "gb_of_products", "gb_kept"):
            assert counts[field] == pytest.approx(now[field], rel=0.01), f"{field}: {remedy}"
        assert counts["gb_outside_products"] < before["gb_outside_products"] - 2.2
        assert counts["gb_kept"] <= before["gb_kept"]
    assert counted["now"]["none"]["gb_outside_products"] < 4.55
