"""Programs that a model has written, run apart from everything: each in a fresh interpreter behind the walls of
`jail.py`, with limits on time, memory, processes and files, an empty folder and nothing of this process's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")

_SETUP_SECONDS = 30.0
"""What an interpreter may need to start on a busy machine."""


@dataclass(frozen=True)
class Limits:
    """Of one program: CPU seconds, seconds by the clock, bytes of memory, of a file and of all files, processes."""

    cpu_seconds: int = 5
    seconds: float = 15.0
    memory: int = 1 << 30
    file: int = 16 << 20
    disk: int = 64 << 20
    processes: int = 16


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end without an exception; otherwise why not. `walls` are those that stood around it
    (see `jail.py`); None if it was not run at all."""

    passed: bool
    reason: str
    walls: frozenset[str] | None


def run_program(program: str, limits: Limits | None = None) -> Verdict:
    """Run a Python program to its end or to a limit. Never raises for what the program does."""
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="megalite-sandbox-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        kinds = {"cpu": limits.cpu_seconds, "memory": limits.memory, "file": limits.file, "disk": limits.disk}
        job = {
            "program": program,
            "folder": folder,
            "seconds": limits.seconds,
            "limits": kinds | {"processes": limits.processes},
        }
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        warden = subprocess.Popen(
            [sys.executable, "-I", "-B", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            output, _ = warden.communicate(json.dumps(job).encode(), timeout=limits.seconds + _SETUP_SECONDS)
            found = json.loads(output)
        except (subprocess.TimeoutExpired, ValueError):
            warden.kill()
            warden.communicate()
            return Verdict(False, "the sandbox did not answer", None)
    walls = None if found["walls"] is None else frozenset(found["walls"])
    return Verdict(found["passed"], found["reason"], walls)


def run_programs(
    programs: Sequence[str], limits: Limits | None = None, told: Callable[[int], object] = lambda count: None
) -> list[Verdict]:
    """`run_program` for each, on all cores of this process; `told` gets 1 after each."""

    def one(program: str) -> Verdict:
        verdict = run_program(program, limits)
        told(1)
        return verdict

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as workers:
        return list(workers.map(one, programs))


def describe(walls: frozenset[str] | None) -> str:
    """What holds programs on this machine, and what does not, in one line."""
    if walls is None:
        return "the sandbox cannot be set up on this machine"
    network = {
        True: "no network",
        False: "no TCP connections, but other network traffic is not held back"
        if "landlock" in walls
        else "the NETWORK IS OPEN to them: this kernel allows neither namespaces nor Landlock",
    }["network" in walls]
    files = {
        True: "no file outside their folder can be changed",
        False: "files of this user are NOT protected: this kernel allows neither namespaces nor Landlock",
    }[bool(walls & {"files", "landlock", "user"})]
    return f"generated programs run with limits; {network}; {files}"
