"""Fault injection on real jobs, by tools/torture.py.

One fault of each kind takes about six minutes on two cores; longer sieges (`--faults 50`, 1000 for a night) are for the
command line.
"""

import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).resolve().parents[2] / "tools" / "torture.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faults_leave_no_trace_in_the_weights(tmp_path):
    command = [sys.executable, str(TORTURE), "--faults", "16", "--seed", "7", "--work-dir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "bitwise equal" in done.stdout
