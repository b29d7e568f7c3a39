"""Run all ranks of one machine: `bash launch/local.sh RECIPE.toml [--processes N] ...`.

What it adds to `torchrun -m megalite.train`: the configuration is checked before any rank starts; nothing listens
beyond the loopback interface; SIGTERM and SIGUSR1 (stop with a checkpoint) and Ctrl-C reach the ranks, which get all
the time they need for their checkpoint; the exit code is the trainer's own, where torchrun makes 1 of every failure.

`bash launch/local.sh PROGRAM.py [--processes N] ...` runs the ranks of another program, tools/generate.py for instance.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # a request waits from now on, before libraries are imported, until somebody listens
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP))

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megalite.affinity import own_cores
from megalite.cli import program
from megalite.config import parse_command_line
from megalite.errors import FINISHED, INTERRUPTED, STOPPED, UNUSABLE, UserError
from megalite.processes import GPU_ENVIRONMENT, Processes, outcome, run_ranks
from megalite.train.inputs import check_inputs

USAGE = "usage: bash launch/local.sh RECIPE.toml|PROGRAM.py [--processes N] [--check] [--SECTION.FIELD VALUE ...]"


def take_processes(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """The arguments without `--processes N`, and N."""
    rest = list(arguments)
    for index, argument in enumerate(rest):
        option, equals, text = argument.partition("=")
        if option != "--processes":
            continue
        if not equals:
            text = rest[index + 1] if index + 1 < len(rest) else ""
        if not (text.isdecimal() and len(text) <= 5 and int(text) > 0):
            raise UserError(f"--processes {text or 'without a value'} is not a number of processes; give 1 or more")
        del rest[index : index + (1 if equals else 2)]
        return rest, int(text)
    return rest, None


def count_gpus(device: str) -> int:
    """GPUs that a job with this `run.device` may use here."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def rank_environment(processes: int, gpus: int) -> dict[str, str]:
    """Environment variables set for the ranks unless the user has set them."""
    environment = {"OMP_NUM_THREADS": str(max(1, len(own_cores()) // processes))}
    if gpus:
        return environment | GPU_ENVIRONMENT
    # glibc otherwise returns the logits' memory to the system after every step and asks for it again
    return environment | {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "67108864",
    }


def plan(arguments: Sequence[str], processes: int | None) -> tuple[list[str], int, int, str] | None:
    """(command of a rank, how many, GPUs, where to look after a fault), checked; None if a check was all."""
    if arguments[0].endswith(".py"):
        if not Path(arguments[0]).is_file():
            raise UserError(f"{arguments[0]} does not exist; give a recipe or a program such as tools/generate.py")
        on_cpu = "--run.device=cpu" in " ".join(arguments).replace("--run.device ", "--run.device=")
        gpus = count_gpus("cpu" if on_cpu else "auto")
        return [sys.executable, *arguments], processes or gpus or 1, gpus, "what it says"
    command = parse_command_line(arguments, "bash launch/local.sh", taken=["--processes"])
    gpus = count_gpus(command.config.run.device)
    processes = processes or gpus or command.config.model_parallel
    print(check_inputs(command.config, processes, count_parameters=False), flush=True)
    if command.check_only:
        return None
    return [sys.executable, "-u", "-m", "megalite.train", *arguments], processes, gpus, f"{command.config.run.dir}/log"


@program
def main() -> int:
    arguments, count = take_processes(sys.argv[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, "", "python -m megalite.train --help lists the sections and fields.", sep="\n")
        return FINISHED if arguments else UNUSABLE
    processes = Processes()
    with processes.listening():
        planned = plan(arguments, count)
        if planned is None:
            return FINISHED
        command, count, gpus, log = planned
        environment = {**rank_environment(count, gpus), **os.environ}
        ends = run_ranks(processes, command, count, environment)
    code = outcome([code for _, code in ends], processes.requests)
    if code not in (FINISHED, UNUSABLE, STOPPED, INTERRUPTED):
        for rank, end in ends:
            if end < 0 and -end not in processes.requests:
                print(f"error: rank {rank} died of {signal.Signals(-end).name}; see {log}", file=sys.stderr)
            elif end not in (FINISHED, STOPPED):
                print(f"error: rank {rank} failed; see {log}", file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing is left to do, and an ordinary exit would take torch apart first
