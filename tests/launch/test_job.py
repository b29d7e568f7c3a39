"""launch/job.sh with stand-ins for SLURM's commands: what only a coincidence brings about on a real cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]

PROGRAMS = {
    "squeue": """case "$*" in *--steps*) echo "7.0 megalite-train" ;; *%e*) echo N/A ;; esac""",
    "scontrol": """case "$1" in
show) echo "JobId=7 JobState=RUNNING Reason=None Restarts=0 end" ;;
requeue) kill -TERM "$PPID"; sleep 1 ;;
esac""",
    "scancel": 'echo "$*" >> "$CALLS"',
    "srun": 'eval "$STEP"',
    "sleep": "exec /bin/sleep 0.1",
}


@pytest.fixture
def job(tmp_path):
    """Starts the script, its step being a line of shell; and the requests to stop that were sent to the step."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    for name in ("log", "launch"):
        (tmp_path / "run" / name).mkdir(parents=True)
    script = tmp_path / "job.sh"
    settings = {"RUN": tmp_path / "run", "SUBMISSION": tmp_path / "run/launch/001", "HEAD": "n0", "PORT": 1}
    settings |= {"PREFLIGHT": "no", "CHAINED": "no", "MAX_REQUEUES": 3, "SIGNAL_SECONDS": 30, "RANKS": 2}
    settings |= {"REPOSITORY": ROOT, "PYTHON": "python"}
    lines = [f"{name}={value}" for name, value in settings.items()] + ["SRUN=() CONTAINER=() RECIPE=()"]
    script.write_text("\n".join(lines) + "\n" + (ROOT / "launch/job.sh").read_text())
    calls = tmp_path / "calls"
    place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "CALLS": str(calls)}
    place["PATH"] = f"{folder}:{os.environ['PATH']}"

    def start(step: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(script)], env=os.environ | place | {"STEP": step}, stdout=subprocess.PIPE, text=True
        )

    def requests() -> list[str]:
        return calls.read_text().splitlines() if calls.exists() else []

    return start, requests


def test_a_requeue_asks_nothing_of_the_next_start(job):
    """SLURM ends the script that gave its job back with SIGTERM, and the job's next start has the same number."""
    start, requests = job
    process = start("exit 1")
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1 and "given back to the queue" in output and "asking the ranks" not in output
    time.sleep(0.5)
    assert requests() == []


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_requests_end_with_the_script(job, end):
    """However the script ends, nobody goes on asking."""
    start, requests = job
    asked = '[ "$(wc -l < "$CALLS" 2> /dev/null || echo 0)" -ge 3 ]'
    process = start(f"for i in {{1..50}}; do {asked} && break; sleep 1; done; exit 75")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: len(requests()) >= 2)
    if end:
        process.send_signal(end)
        process.wait(PATIENCE_SECONDS)
    else:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert "SIGTERM: asking the ranks" in output and "given back to the queue" in output
    time.sleep(1)
    after = requests()
    assert set(after) == {"--signal=USR1 7.0"}
    time.sleep(1)
    assert requests() == after
