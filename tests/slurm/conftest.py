"""One cluster for the whole session, and runs on it: a tiny model on CPUs, submitted as a user would."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megalite.checkpoint.directory import complete_checkpoints
from megalite.checkpoint.source import CheckpointReader
from tests.slurm.cluster import Cluster, missing, until
from tests.support.tiny import write_recipe

ROOT = Path(__file__).parents[2]
STEPS = 40

SLOW = """#!{python}
# `python -m megalite.train` with steps of a fifth of a second at least, so that a test comes in time to disturb them.
import sys
import time

from megalite.train.__main__ import main
from megalite.train.loop import TrainingRun
from megalite.runtime import leave

step = TrainingRun._step


def slow_step(self, number):
    time.sleep(0.2)
    return step(self, number)


TrainingRun._step = slow_step
leave(main(sys.argv[3:]))
"""


class Run:
    """A run directory on the cluster and the jobs that work on it."""

    def __init__(self, cluster: Cluster, folder: Path, recipe: Path, python: Path | str) -> None:
        self.cluster, self.folder, self.recipe, self.python = cluster, folder, recipe, python
        self.jobs: list[str] = []

    def submit(
        self,
        *overrides: str,
        options: str = "--no-preflight",
        nodes: int = 2,
        tasks: int = 1,
        layout: Sequence[str] = ("--parallel.pipeline", "2"),
        check: bool = True,
    ) -> list[str]:
        """Submit through launch/slurm.py; the jobs' numbers."""
        where = [] if self.cluster.network else ["--master-addr", "127.0.0.1", "--ifname", "lo"]
        words = [sys.executable, str(ROOT / "launch/slurm.py"), "--recipe", str(self.recipe), "--nodes", str(nodes)]
        words += ["--gpus-per-node", "0", "--tasks-per-node", str(tasks), "--python", str(self.python), *where]
        words += ["--signal-seconds", "30", *shlex.split(options)]
        words += ["--", "--run.dir", str(self.folder), *layout, *overrides]
        output = self.cluster.command(*words, check=check)
        self.jobs = re.findall(r"\d+", output.partition(":")[0]) if output.startswith("job ") else []
        return self.jobs

    @property
    def log(self) -> str:
        """What all jobs' scripts wrote, in order."""
        paths = sorted(self.folder.glob("launch/slurm-*.out"), key=lambda path: int(path.stem.rpartition("-")[2]))
        return "".join(path.read_text() for path in paths)

    def rank_log(self, rank: int) -> str:
        return (self.folder / f"log/rank_{rank:05d}.log").read_text()

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def wait_for_step(self, step: int) -> None:
        until(lambda: (self.steps() or [0])[-1] >= step, f"step {step} of {self.folder}: {self.log}")

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log, f"{text!r} in the job's log")

    def finish(self) -> tuple[str, str]:
        """(state, exit code) of the newest job once it has ended."""
        try:
            return self.cluster.wait(self.jobs[-1])
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def ranks(self) -> dict[int, int]:
        """Process of each rank that lives, on any node."""
        found = {}
        for process, variables in self.cluster.processes():
            values = dict(entry.partition("=")[::2] for entry in variables)
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            if str(self.folder).encode() in command and b"megalite.train" in command and "LOCAL_RANK" in values:
                found[int(values["RANK"])] = process
        return found

    def weights(self, step: int = STEPS) -> dict[str, bytes]:
        """The tensor files of a checkpoint that verifies."""
        path = self.folder / "checkpoints" / f"step_{step:08d}"
        with CheckpointReader(path) as reader:
            reader.verify()
        return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}

    def end(self) -> None:
        """Take what is left of the jobs off the cluster."""
        cluster = self.cluster
        for job in self.jobs:
            cluster.command("scancel", "--full", "--signal=KILL", job, check=False)
            cluster.command("scancel", job, check=False)
        left = set(self.jobs)
        until(lambda: not left & set(cluster.command("squeue", "-h", "-o", "%i").split()), "the jobs are gone")

    def checkpoints(self) -> list[int]:
        return [step for step, _ in complete_checkpoints(self.folder / "checkpoints")]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"SLURM does not start on this machine: {error}")
    yield cluster
    cluster.close()
    left = [process for process, _ in cluster.processes()]
    assert not left, f"processes were left behind: {left}"


@pytest.fixture(autouse=True)
def fit(cluster: Cluster) -> None:
    """Every test begins with all nodes in service."""
    cluster.heal()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, train={"steps": STEPS, "timeout_seconds": 10}, checkpoint={"interval": 5, "keep": 0})


def slow_run(cluster: Cluster, recipe: Path, folder: Path) -> Run:
    """A run whose steps are slow enough to be disturbed."""
    python = folder / "slow-python"
    python.write_text(SLOW.format(python=sys.executable))
    python.chmod(0o755)
    return Run(cluster, folder / "run", recipe, python)


@pytest.fixture
def run(cluster: Cluster, recipe: Path, tmp_path: Path) -> Iterator[Run]:
    run = slow_run(cluster, recipe, tmp_path)
    yield run
    run.end()


@pytest.fixture(scope="session")
def overdue(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A job of two minutes whose ranks do not react any more. It takes no processor, and other tests run beside it."""
    run = slow_run(cluster, recipe, tmp_path_factory.mktemp("overdue"))
    run.submit("--train.steps", "5000", options="--no-preflight --time 2 --signal-seconds 20")
    until(lambda: run.checkpoints(), "the first checkpoint")
    for process in run.ranks().values():
        os.kill(process, signal.SIGSTOP)
    yield run
    run.end()


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to, finished: what all others are compared with."""
    run = Run(cluster, tmp_path_factory.mktemp("undisturbed") / "run", recipe, sys.executable)
    run.submit()
    assert run.finish() == ("COMPLETED", "0:0"), run.log
    return run
