"""Torture a real training job: kill it, hang it, stop it, fill its disk, damage its checkpoints, at random moments.

    python tools/torture.py [--faults 50] [--seed 1] [--processes 2] [--work-dir DIR]

First a small model is trained undisturbed. Then the same run is made again while faults fall on it, and is restarted
after each by the same command, as a scheduler would. At the end the weights and moments must be bitwise those of the
undisturbed run. After every fault, each checkpoint that was not damaged on purpose must verify. Exit code 0 if all of
this holds, 1 if not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from megalite.checkpoint.directory import complete_checkpoints
from megalite.checkpoint.source import CheckpointReader
from megalite.data.indexed import IndexedWriter
from megalite.errors import UserError, exit_on_user_error

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "local.py"
STEPS_PER_FAULT = 25
FULL_DISK_BLOCKS = 40
"""`ulimit -f` in KiB: smaller than a checkpoint file, larger than the metrics."""
PATIENCE_SECONDS = 180.0
FAULTS = ("kill", "kill all", "hang", "stop", "full disk", "flip", "truncate", "lose file")


@dataclass
class Arguments:
    """Torture a small training job and compare its end with that of an undisturbed one."""

    faults: int = 50
    """How many faults fall."""
    seed: int = 1
    """Of the choice and the moments of the faults."""
    processes: int = 2
    """Ranks; they form tensor 2 where the number is even."""
    work_dir: Path | None = None
    """Where the runs go; a temporary directory that is removed after success by default."""


class Tormented(AssertionError):
    """The job did not survive as it must."""


class Job:
    """The run under torture: started, watched and ended as a process group."""

    def __init__(self, command: list[str], run_dir: Path) -> None:
        self.command, self.run_dir = command, run_dir
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, full_disk: bool = False) -> None:
        command = self.command
        if full_disk:
            command = ["bash", "-c", f'ulimit -f {FULL_DISK_BLOCKS}; exec "$@"', "bash", *command]
        with (self.run_dir.parent / "output.log").open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def steps_made(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_progress(self) -> None:
        """Until the run has made a few steps since its start, or has ended."""
        before, deadline = None, time.monotonic() + PATIENCE_SECONDS
        while self.running() and time.monotonic() < deadline:
            made = self.steps_made()
            if before is not None and made > before + 2:
                return
            before = made if before is None or made < before else before
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        assert self.process is not None
        listed = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(word) for word in listed.stdout.split()]

    def wait(self) -> int:
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.destroy()
            raise Tormented(f"the job did not end within {PATIENCE_SECONDS:.0f} s") from None

    def destroy(self) -> None:
        """kill -9 for everything that belongs to the job, as a node that goes down."""
        assert self.process is not None
        for process in (*self.ranks(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def write_corpus(prefix: Path) -> None:
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(400):
            writer.add_document(rng.integers(0, 128, rng.integers(20, 200)).astype(np.uint16))
        writer.finish()


def make_command(work: Path, run_dir: Path, arguments: Arguments) -> list[str]:
    settings = {
        "run.dir": str(run_dir),
        "run.device": "cpu",
        "data.train": json.dumps([str(work / "corpus")]),
        "model.layers": "2",
        "model.hidden_size": "32",
        "model.ffn_hidden_size": "64",
        "model.heads": "4",
        "model.vocab_size": "128",
        "model.max_positions": "32",
        "parallel.tensor": "2" if arguments.processes % 2 == 0 else "1",
        "train.steps": str(max(2, arguments.faults) * STEPS_PER_FAULT),
        "train.seq_length": "32",
        "train.micro_batch_size": "2",
        "train.global_batch_size": str(4 * arguments.processes),
        "train.precision": "fp32",
        "train.timeout_seconds": "15",
        "checkpoint.interval": "5",
        "checkpoint.keep": "4",
        "checkpoint.async_save": "true",
        "log.tensorboard": "false",
        "log.interval": "1000000",
    }
    options = [word for field, value in settings.items() for word in (f"--{field}", value)]
    recipe = work / "empty.toml"
    recipe.touch()
    return [sys.executable, str(LAUNCHER), str(recipe), "--processes", str(arguments.processes), *options]


def damage(run_dir: Path, kind: str, chance: random.Random) -> Path | None:
    """Damage a file of the newest checkpoint, unless it is the only one; returns the checkpoint."""
    found = complete_checkpoints(run_dir / "checkpoints")
    if len(found) < 2:
        return None
    checkpoint = found[-1][1]
    file = chance.choice(sorted(path for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json")))
    if kind == "lose file":
        file.unlink()
    elif kind == "truncate":
        os.truncate(file, chance.randrange(file.stat().st_size))
    else:
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return checkpoint


def inflict(job: Job, kind: str, chance: random.Random) -> Path | None:
    """Let one fault fall on the running job and wait until it is down; returns a checkpoint damaged on purpose."""
    job.wait_for_progress()
    time.sleep(chance.random() * 0.5)
    ranks = job.ranks()
    if not job.running() or not ranks:
        return None
    assert job.process is not None
    if kind in ("kill", "hang"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(ranks), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        if job.wait() == 0:
            raise Tormented("the job called itself finished")
    elif kind == "stop":
        job.process.send_signal(signal.SIGTERM)
        if job.wait() not in (0, 75):
            raise Tormented(f"asked to stop, the job ended with {job.process.returncode}, not 75")
    else:
        job.destroy()
    return damage(job.run_dir, kind, chance) if kind in ("flip", "truncate", "lose file") else None


def verify(run_dir: Path, damaged: set[Path]) -> None:
    """Every checkpoint under a final name that was not damaged on purpose must be whole."""
    for _, path in complete_checkpoints(run_dir / "checkpoints"):
        if path not in damaged:
            try:
                with CheckpointReader(path) as reader:
                    faults = reader.verify()
            except UserError as error:
                faults = [str(error)]
            if faults:
                raise Tormented(f"a checkpoint that was acknowledged is unreadable: {faults[0]}")


def final_state(run_dir: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of the newest checkpoint."""
    step, path = complete_checkpoints(run_dir / "checkpoints")[-1]
    with CheckpointReader(path) as reader:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for name, shape in reader.shapes().items():
                tensor = reader.read_kind(kind, name, (0,) * len(shape), shape)
                yield f"step {step} {kind} {name}", tensor.numpy()


def compare(calm: Path, tormented: Path) -> int:
    """Number of tensors, all bitwise equal; raises at the first that differs."""
    count = 0
    for (name, one), (other_name, other) in zip(final_state(calm), final_state(tormented), strict=True):
        if name != other_name or not np.array_equal(one, other):
            raise Tormented(f"{name} of the undisturbed run differs from {other_name}")
        count += 1
    return count


def torture(work: Path, arguments: Arguments) -> None:
    chance = random.Random(arguments.seed)
    write_corpus(work / "corpus")
    calm = Job(make_command(work, work / "calm", arguments), work / "calm")
    calm.start()
    if code := calm.wait():
        raise Tormented(f"the undisturbed run ended with {code}; see {work}/output.log")
    job = Job(make_command(work, work / "tormented", arguments), work / "tormented")
    damaged: set[Path] = set()
    counts: Counter[str] = Counter()
    for number in range(arguments.faults):
        kind = FAULTS[number % len(FAULTS)] if number < len(FAULTS) else chance.choice(FAULTS)
        job.start(full_disk=kind == "full disk")
        try:
            hurt = inflict(job, kind, chance)
        except Tormented as error:
            raise Tormented(f"fault {number + 1}, {kind}: {error}") from None
        damaged = {path for path in damaged if path.exists()} | ({hurt} if hurt else set())
        counts[kind] += 1
        verify(job.run_dir, damaged)
        print(f"fault {number + 1}/{arguments.faults}: {kind}; {job.steps_made()} steps made", flush=True)
    job.start()
    if code := job.wait():
        raise Tormented(f"the last start ended with {code}; see {work}/output.log")
    tensors = compare(calm.run_dir, job.run_dir)
    faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
    print(f"ok: {faults}; {tensors} tensors bitwise equal to those of the undisturbed run")


@exit_on_user_error
def main() -> int:
    arguments = tyro.cli(Arguments)
    work = arguments.work_dir or Path(tempfile.mkdtemp(prefix="megalite-torture-"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise UserError(f"--work-dir {work} is not empty; name a new directory")
    try:
        torture(work, arguments)
    except Tormented as error:
        print(f"error: {error}; everything is left in {work}", file=sys.stderr)
        return 1
    if arguments.work_dir is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
