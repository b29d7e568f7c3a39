"""Torture a real training job: kill it, hang it, stop it, fill its disk, damage its checkpoints, at random moments.

    python tools/torture.py [--faults 50] [--seed 1] [--processes 2] [--no-tensorboard] [--work-dir DIR]

First a small model is trained undisturbed. Then the same run is made again while faults fall on it, and is restarted
after each by the same command, as a scheduler would. At the end the weights and moments must be bitwise those of the
undisturbed run. After every fault, each checkpoint that was not damaged on purpose must verify. Faults of what stands
beside the work (TensorBoard, the loss curve) must not end the job at all. Exit code 0 if all of this holds, 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.checkpoint.directory import complete_checkpoints
from megalite.checkpoint.source import CheckpointReader
from megalite.cli import Parser, file_path, program, whole
from megalite.data.indexed import IndexedWriter
from megalite.errors import FINISHED, STOPPED, UNUSABLE, UserError

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "local.py"
STEPS_PER_FAULT = 25
KEEP = 4
FULL_DISK_BLOCKS = 40
"""`ulimit -f` in KiB: smaller than a checkpoint file, larger than the metrics."""
PATIENCE_SECONDS = 180.0
"""The least; `Pace` adds what the machine turns out to need."""


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--faults", type=whole(), default=50, metavar="N", help="how many faults fall (50)")
    add("--seed", type=whole(0), default=1, metavar="S", help="of the choice and the moments of the faults (1)")
    add("--processes", type=whole(1, 64), default=2, metavar="N", help="ranks; tensor 2 where the number is even (2)")
    add(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=importlib.util.find_spec("tensorboard") is not None,
        help="write TensorBoard events, on which faults then fall too (default: where it is installed)",
    )
    add("--work-dir", type=file_path, metavar="DIR", help="for the runs (default: temporary, removed after success)")
    return parser.parse_args()


class TortureFailed(AssertionError):
    """The job did not survive as it must."""


@dataclass
class Pace:
    """How long to wait: in multiples of what this machine takes, measured on the go.

    `start` and `step` are the longest seconds seen of a start-up and of a step; other work on the machine may slow both
    down several times from one minute to the next.
    """

    start: float = 0.0
    step: float = 0.0

    def observe(self, start: float, step: float) -> None:
        self.start, self.step = max(self.start, start), max(self.step, step)

    def patience(self, steps: int) -> float:
        """Seconds after which a job that has this many steps to make is taken for stuck."""
        return PATIENCE_SECONDS + 10.0 * (self.start + steps * self.step)


class Job:
    """The run under torture: started, watched and ended as a process group."""

    def __init__(self, command: list[str], run_dir: Path, pace: Pace) -> None:
        self.command, self.run_dir, self.pace = command, run_dir, pace
        self.process: subprocess.Popen[bytes] | None = None
        self.output = self._next_output()

    def _next_output(self) -> Path:
        """A file for each start: under a full disk a long one could not grow."""
        folder = self.run_dir.parent / f"output of {self.run_dir.name}"
        folder.mkdir(exist_ok=True)
        return folder / f"{len(list(folder.iterdir())) + 1:04d}.log"

    def start(self, full_disk: bool = False) -> None:
        command = self.command
        if full_disk:
            command = ["bash", "-c", f'ulimit -f {FULL_DISK_BLOCKS}; exec "$@"', "bash", *command]
        self.output = self._next_output()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def steps_made(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_until(self, condition: Callable[[], bool], poll_seconds: float = 0.02) -> bool:
        """Until it holds (True) or the run has ended (False)."""
        deadline = time.monotonic() + self.pace.patience(STEPS_PER_FAULT)
        while self.running():
            if condition():
                return True
            if time.monotonic() > deadline:
                self.destroy()
                raise TortureFailed(f"no progress in {self.pace.patience(STEPS_PER_FAULT):.0f} s")
            time.sleep(poll_seconds)
        return False

    def wait_for_progress(self) -> None:
        """Until the run has made a few steps since its start, or has ended."""
        began, before = time.monotonic(), self.steps_made()
        self.wait_until(lambda: self.steps_made() != before)  # the restart has taken back lines, or added one
        started, before = time.monotonic(), self.steps_made()
        if self.wait_until(lambda: self.steps_made() > before + 2):
            self.pace.observe(started - began, (time.monotonic() - started) / 3)

    def ranks(self) -> list[int]:
        assert self.process is not None
        listed = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(word) for word in listed.stdout.split()]

    def wait(self) -> int:
        """The exit code. A job that makes steps is not stuck."""
        assert self.process is not None
        made, deadline = -1, 0.0
        while self.running():
            if self.steps_made() != made:
                made, deadline = self.steps_made(), time.monotonic() + self.pace.patience(STEPS_PER_FAULT)
            if time.monotonic() > deadline:
                self.destroy()
                raise TortureFailed(f"the job has made no step for {self.pace.patience(STEPS_PER_FAULT):.0f} s")
            time.sleep(0.05)
        return self.process.wait()

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


def make_job(work: Path, run_dir: Path, arguments: argparse.Namespace, pace: Pace) -> Job:
    settings = {
        "run.dir": str(run_dir),
        "run.device": "cpu",
        "data.train": json.dumps([str(work / "corpus")]),
        "data.cache_dir": str(work / "cache"),
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
        "checkpoint.keep": str(KEEP),
        "checkpoint.async_save": "true",
        "log.tensorboard": str(arguments.tensorboard).lower(),
        "log.interval": "1000000",
    }
    options = [word for field, value in settings.items() for word in (f"--{field}", value)]
    recipe = work / "empty.toml"
    recipe.touch()
    command = [sys.executable, str(LAUNCHER), str(recipe), "--processes", str(arguments.processes), *options]
    return Job(command, run_dir, pace)


# Faults: each falls on a job that was just started, waits until that is down, and returns a checkpoint that was damaged
# on purpose, if any.

Fault = Callable[[Job, random.Random], Path | None]


def _under_way(job: Job, chance: random.Random) -> bool:
    """Let the job make some steps; whether it still runs."""
    job.wait_for_progress()
    time.sleep(chance.random() * 0.5)
    return job.running() and bool(job.ranks())


def _one_rank(number: int) -> Fault:
    def fall(job: Job, chance: random.Random) -> Path | None:
        if _under_way(job, chance):
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(chance.choice(job.ranks()), number)
            if (code := job.wait()) in (FINISHED, STOPPED, UNUSABLE):
                raise TortureFailed(f"the job lost a rank and ended with {code}")
        return None

    return fall


def _stop(job: Job, chance: random.Random) -> Path | None:
    if _under_way(job, chance):
        _ask(job, chance)
    return None


def _stop_in_start_up(job: Job, chance: random.Random) -> Path | None:
    time.sleep(chance.random() * (2.0 + job.pace.start))
    _ask(job, chance)
    return None


def _ask(job: Job, chance: random.Random) -> None:
    assert job.process is not None
    job.process.send_signal(chance.choice((signal.SIGTERM, signal.SIGUSR1)))
    if job.wait() not in (FINISHED, STOPPED):
        raise TortureFailed(f"asked to stop, the job ended with {job.process.returncode}, not {STOPPED}")


def _kill_all(job: Job, chance: random.Random) -> Path | None:
    if _under_way(job, chance):
        job.destroy()
    return None


def _full_disk(job: Job, chance: random.Random) -> Path | None:
    """Training goes on while checkpoints fail, and says so."""
    if job.wait_until(lambda: b"could not be saved" in job.output.read_bytes()):
        time.sleep(chance.random())
        job.destroy()
    return None


def _kill_in_start_up(job: Job, chance: random.Random) -> Path | None:
    time.sleep(chance.random() * (2.0 + job.pace.start))
    job.destroy()
    return None


def _kill_when(happens: Callable[[Path], bool]) -> Fault:
    """Everything is killed as soon as something can be seen in the run directory; after some saves in any case."""

    def fall(job: Job, chance: random.Random) -> Path | None:
        job.wait_for_progress()
        before = job.steps_made()
        if job.wait_until(lambda: happens(job.run_dir) or job.steps_made() > before + STEPS_PER_FAULT, 0.001):
            time.sleep(chance.random() * 0.002)
            job.destroy()
        return None

    return fall


def _saving(run_dir: Path) -> bool:
    return any(run_dir.glob("checkpoints/*.partial"))


def _retiring(run_dir: Path) -> bool:
    """A checkpoint has become complete, and one more than are kept lie there, or one is being deleted."""
    names = [path.name for path in run_dir.glob("checkpoints/step_*")]
    return any(name.endswith(".deleted") for name in names) or sum("." not in name for name in names) > KEEP


def _kill_while_indexing(job: Job, chance: random.Random) -> Path | None:
    """The cached index is taken away, so that this start builds it."""
    cache = job.run_dir.parent / "cache"
    job.destroy()
    shutil.rmtree(cache, ignore_errors=True)
    job.start()
    if job.wait_until(lambda: cache.exists() and any(cache.iterdir()), 0.001):
        time.sleep(chance.random() * 0.02)
        job.destroy()
    return None


def _damage(kind: str) -> Fault:
    def fall(job: Job, chance: random.Random) -> Path | None:
        if not _under_way(job, chance):
            return None
        job.destroy()
        found = complete_checkpoints(job.run_dir / "checkpoints")
        if len(found) < 2:  # the only one is not damaged: nothing would be left to go on from
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

    return fall


def _beside(hurt: Callable[[Path], object], mend: Callable[[Path], object], *, before_start: bool = False) -> Fault:
    """Something beside the work breaks: the job must go on as if nothing were, and stop in order when asked."""

    def fall(job: Job, chance: random.Random) -> Path | None:
        if not _under_way(job, chance):
            return None
        if before_start:
            job.destroy()
        hurt(job.run_dir)
        try:
            if before_start:
                job.start()
                job.wait_for_progress()
            before = job.steps_made()
            if not job.wait_until(lambda: job.steps_made() > before + 5):
                if job.wait() != FINISHED:
                    assert job.process is not None
                    raise TortureFailed(f"the job ended with {job.process.returncode} for something beside it")
                return None
            _ask(job, chance)
        finally:
            mend(job.run_dir)
        return None

    return fall


def _occupy(path: Path) -> None:
    """A directory in the place of a file: not even root can write there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.mkdir()


def _fill_tensorboards_disk(run_dir: Path) -> None:
    """Its folder is on a disk of its own, with room for some steps; without the right to mount one it is a file."""
    folder = run_dir / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        folder.write_text("")


def _clear_tensorboard(run_dir: Path) -> None:
    folder = run_dir / "tensorboard"
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
    if folder.is_file():
        folder.unlink()


def _leave_alone(run_dir: Path) -> None:
    """Nothing to mend."""


FAULTS: dict[str, Fault] = {
    "kill in a save": _kill_when(_saving),  # the first fault: the run's first save
    "kill": _one_rank(signal.SIGKILL),
    "kill all": _kill_all,
    "hang": _one_rank(signal.SIGSTOP),
    "stop": _stop,
    "full disk": _full_disk,
    "flip": _damage("flip"),
    "truncate": _damage("truncate"),
    "lose file": _damage("lose file"),
    "stop in start-up": _stop_in_start_up,
    "kill in start-up": _kill_in_start_up,
    "kill in retention": _kill_when(_retiring),
    "kill while indexing": _kill_while_indexing,
    "picture that cannot be written": _beside(
        lambda run: _occupy(run / "loss.png"), lambda run: (run / "loss.png").rmdir()
    ),
    "TensorBoard's folder vanishes": _beside(
        lambda run: shutil.rmtree(run / "tensorboard", ignore_errors=True), _leave_alone
    ),
    "TensorBoard's disk is full": _beside(_fill_tensorboards_disk, _clear_tensorboard, before_start=True),
}


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
                raise TortureFailed(f"a checkpoint that was acknowledged is unreadable: {faults[0]}")


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
            raise TortureFailed(f"{name} of the undisturbed run differs from {other_name}")
        count += 1
    return count


def torture(work: Path, arguments: argparse.Namespace) -> None:
    chance, pace = random.Random(arguments.seed), Pace()
    write_corpus(work / "corpus")
    calm = make_job(work, work / "calm", arguments, pace)
    calm.start()
    if code := calm.wait():
        raise TortureFailed(f"the undisturbed run ended with {code}; see {calm.output}")
    job = make_job(work, work / "tormented", arguments, pace)
    damaged: set[Path] = set()
    counts: Counter[str] = Counter()
    kinds = [kind for kind in FAULTS if arguments.tensorboard or "TensorBoard" not in kind]
    for number in range(arguments.faults):
        kind = kinds[number] if number < len(kinds) else chance.choice(kinds)
        job.start(full_disk=kind == "full disk")
        try:
            hurt = FAULTS[kind](job, chance)
        except TortureFailed as error:
            raise TortureFailed(f"fault {number + 1}, {kind}: {error}") from None
        damaged = {path for path in damaged if path.exists()} | ({hurt} if hurt else set())
        counts[kind] += 1
        verify(job.run_dir, damaged)
        print(f"fault {number + 1}/{arguments.faults}: {kind}; {job.steps_made()} steps made", flush=True)
    job.start()
    if code := job.wait():
        raise TortureFailed(f"the last start ended with {code}; see {job.output}")
    tensors = compare(calm.run_dir, job.run_dir)
    faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
    print(f"ok: {faults}; {tensors} tensors bitwise equal to those of the undisturbed run")


@program
def main() -> int:
    arguments = parse()
    work = arguments.work_dir or Path(tempfile.mkdtemp(prefix="megalite-torture-"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise UserError(f"--work-dir {work} is not empty; name a new directory")
    try:
        torture(work, arguments)
    except TortureFailed as error:
        print(f"error: {error}; everything is left in {work}", file=sys.stderr)
        return 1
    if arguments.work_dir is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
