"""Run all ranks of one machine through torchrun's library: `bash launch/local.sh RECIPE.toml [--processes N] ...`.

What it adds to `torchrun -m megalite.train`: the configuration is checked before any rank starts; SIGTERM and SIGUSR1
(stop with a checkpoint) and Ctrl-C reach the ranks, which get all the time they need for their checkpoint; the exit
code is the trainer's own, where torchrun makes 1 of every failure; a user's mistake is one line, not a report.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from megalite.config import CommandLine, parse_command_line
from megalite.errors import FAULT, FINISHED, INTERRUPTED, STOPPED, UNUSABLE, UserError, exit_on_user_error
from megalite.train.inputs import check_inputs

USAGE = "usage: bash launch/local.sh RECIPE.toml [--processes N] [--check] [--SECTION.FIELD VALUE ...]"


def take_processes(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """The arguments without `--processes N`, and N."""
    rest = list(arguments)
    for index, argument in enumerate(rest):
        option, equals, text = argument.partition("=")
        if option != "--processes":
            continue
        if not equals:
            text = rest[index + 1] if index + 1 < len(rest) else ""
        if not text.isdigit() or int(text) < 1:
            raise UserError(f"--processes {text or 'without a value'} is not a number of processes; give 1 or more")
        del rest[index : index + (1 if equals else 2)]
        return rest, int(text)
    return rest, None


def count_processes(command: CommandLine) -> int:
    """One for each GPU; without GPUs as many as hold the model once."""
    if command.config.run.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count()
    return command.config.model_parallel


def rank_environment(processes: int, on_cpu: bool) -> dict[str, str]:
    """What the ranks' environment gets unless the user has set it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    if on_cpu:
        # glibc otherwise returns the logits' memory to the system after every step and asks for it again
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_TOP_PAD_": str(1 << 26)}
        if Path("/sys/class/net/lo").exists():
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # this machine's own name need not resolve
    return environment


def children() -> list[int]:
    """Process ids of the ranks: this process's children."""
    tasks = list(Path("/proc/self/task").glob("*/children"))
    if tasks:
        return [int(word) for task in tasks for word in task.read_text().split()]
    listed = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


class Forwarder:
    """Hands signals on to the ranks. The second Ctrl-C, or a signal before there are ranks, ends everything at once."""

    def __init__(self) -> None:
        self.interrupted = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        ranks = children()
        if not ranks:
            raise SystemExit(INTERRUPTED if number == signal.SIGINT else 128 + number)
        sent = signal.SIGKILL if number == signal.SIGINT and self.interrupted else number
        self.interrupted |= number == signal.SIGINT
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, sent)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
        previous = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for rank in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)


def launch(arguments: Sequence[str], processes: int, folder: str) -> list[str]:
    """Start the ranks and wait for all of them; what torchrun says of those that failed. It works in `folder`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # all others are the Forwarder's
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megalite.train", *arguments)
    except ChildFailedError as error:
        return [
            f"rank {rank} " + (f"died of {failure.signal_name()}" if failure.exitcode < 0 else "failed")
            for rank, failure in error.failures.items()
            if failure.exitcode not in (UNUSABLE, STOPPED, INTERRUPTED)
        ]
    return []


def translate(codes: Sequence[int], processes: int, interrupted: bool) -> int:
    """The exit code of the whole from those that the ranks left; a rank that died left none."""
    faults = [code for code in codes if code not in (FINISHED, UNUSABLE, STOPPED, INTERRUPTED)]
    if UNUSABLE in codes:
        return UNUSABLE
    if interrupted or INTERRUPTED in codes:
        return INTERRUPTED
    if faults:
        return faults[0]
    if STOPPED in codes:
        return STOPPED
    return FINISHED if len(codes) == processes else FAULT


@exit_on_user_error
def main() -> int:
    arguments, processes = take_processes(sys.argv[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, "", "python -m megalite.train --help lists the sections and fields.", sep="\n")
        return FINISHED if arguments else UNUSABLE
    command = parse_command_line(arguments, "bash launch/local.sh")
    processes = processes or count_processes(command)
    print(check_inputs(command.config, processes), flush=True)
    if command.check_only:
        return FINISHED
    for name, value in rank_environment(processes, command.config.run.device != "cuda").items():
        os.environ.setdefault(name, value)
    forwarder = Forwarder()
    with tempfile.TemporaryDirectory(prefix="megalite-launch-") as folder:
        code_folder = Path(folder) / "codes"
        code_folder.mkdir()
        os.environ["MEGALITE_EXIT_CODES"] = str(code_folder)
        with forwarder.listening():
            failures = launch(arguments, processes, folder)
        codes = [int(path.read_text()) for path in sorted(code_folder.iterdir())]
    code = translate(codes, processes, forwarder.interrupted)
    if code not in (FINISHED, UNUSABLE, STOPPED, INTERRUPTED):
        for failure in failures:
            print(f"error: {failure}; see {command.config.run.dir}/log", file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing is left to do, and an ordinary exit would take torch apart first
