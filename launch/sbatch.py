"""The sbatch script of a job: its settings, each checked and quoted, and launch/job.sh.

Every value that enters goes through one of three functions: `shell` where bash reads it, `directive` where sbatch does,
`comment` where nobody should. Nothing else here writes a value.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite.errors import UserError
from megalite.processes import GPU_ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
BODY = ROOT / "launch" / "job.sh"
_CORES_A_GPU = 8
"""A rank on a GPU is more than one thread: autograd, NCCL's proxies, readers of data, writers of checkpoints."""


@dataclass(frozen=True)
class BatchJob:
    """One training run to be submitted: the options, and what is particular to it (a sweep makes several)."""

    options: argparse.Namespace
    name: str
    run_dir: Path
    overrides: tuple[str, ...]
    tasks_per_node: int

    @property
    def submission(self) -> Path:
        """Path without suffix of this submission's files: the next free number in RUN/launch."""
        taken = [int(path.stem) for path in self.run_dir.glob("launch/*.sbatch") if path.stem.isdecimal()]
        return self.run_dir / "launch" / f"{max(taken, default=0) + 1:03d}"

    @property
    def cpus_per_task(self) -> int | None:
        """None leaves it to SLURM, which gives one."""
        return self.options.cpus_per_task or (_CORES_A_GPU if self.options.gpus_per_node else None)


def checked(name: str, text: str) -> str:
    """`text` if it can stand in a script; UserError naming it where it holds line ends, control characters or bytes
    that are not UTF-8."""
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            shown = text if len(text) <= 80 else f"{text[:80]}…"
            raise UserError(f"{name} = {shown!r} holds {letter!r}, which cannot stand in a job's script; take it out")
    return text


def shell(name: str, text: str) -> str:
    """A word for bash. Commas are quoted as well: outside quotes they look like a mistake in an array."""
    quoted = shlex.quote(checked(name, text))
    return f"'{text}'" if quoted == text and "," in text else quoted


def directive(name: str, text: str) -> str:
    """A line for sbatch, which reads quotation marks, backslashes (in quotation marks, too) and # in its own way."""
    if re.fullmatch(r"[\w./:@%+=,-]+", checked(name, text), re.ASCII):
        return f"#SBATCH {text}"
    return "#SBATCH '" + re.sub(r"(['\\])", r"\\\1", text) + "'"


def comment(text: str) -> str:
    return f"# {checked('the recipe', text)}"


def choose_python(options: argparse.Namespace) -> str:
    """The program that runs the ranks."""
    if options.python:
        return str(options.python)
    if options.container_image or options.setup:
        return "python3"
    for home in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), str(ROOT / ".venv")):
        if home and os.access(f"{home}/bin/python", os.X_OK):
            return f"{home}/bin/python"
    return "python3"


def code_version() -> str:
    """The commit that is checked out, for the record."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def container(job: BatchJob) -> tuple[list[str], list[str]]:
    """(options of srun for pyxis, command before the ranks' command for apptainer)."""
    options = job.options
    if options.container_image is None:
        return [], []
    seen = dict.fromkeys(str(path) for path in (ROOT, Path.cwd(), job.run_dir))
    for path in seen:
        if ":" in path or "," in path:
            raise UserError(f"{path!r} cannot be mounted into a container: it holds a colon or comma; choose another")
    mounts = [f"{path}:{path}" for path in seen] + (options.container_mounts or "").split(",")
    joined = ",".join(mount for mount in mounts if mount)
    image = options.container_image
    runtime = options.container_runtime or ("apptainer" if image.endswith(".sif") else "pyxis")
    if runtime == "pyxis":
        return [f"--container-image={image}", f"--container-mounts={joined}", f"--container-workdir={Path.cwd()}"], []
    gpus = ["--nv"] if options.gpus_per_node else []
    return [], ["apptainer", "exec", *gpus, "--bind", joined, "--pwd", str(Path.cwd()), image]


def directives(job: BatchJob) -> list[str]:
    """What sbatch reads."""
    options = job.options
    if "\\" in str(job.run_dir):
        raise UserError(
            f"run.dir = {str(job.run_dir)!r} holds a backslash, by which SLURM cannot name logs; take it out"
        )
    given = vars(options) | {"cpus_per_task": job.cpus_per_task, "gpus_per_node": options.gpus_per_node or None}
    given |= {"job_name": job.name, "ntasks_per_node": job.tasks_per_node}
    names = ["job_name", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "mem", "time", "partition"]
    names += ["account", "qos", "constraint", "exclude", "reservation"]
    lines = [(f"--{name.replace('_', '-')}", str(given[name])) for name in names if given[name] is not None]
    pattern = str(job.run_dir).replace("%", "%%")  # SLURM replaces %j by the job id
    lines += [("--chdir", str(Path.cwd())), ("--output", f"{pattern}/launch/slurm-%j.out"), ("--open-mode", "append")]
    lines += [("--signal", f"B:USR1@{options.signal_seconds}")]
    written = [directive(f"the {option} of sbatch", f"{option}={value}") for option, value in lines]
    flags = ["--requeue"] + ["--exclusive"] * options.exclusive
    return [*written, *(f"#SBATCH {flag}" for flag in flags)]


def _array(name: str, words: Sequence[str]) -> str:
    """A shell array, on one line if that is short."""
    quoted = [shell(name, word) for word in words]
    line = f"{name}=({' '.join(quoted)})"
    return line if len(line) <= 120 else "\n    ".join([f"{name}=(", *quoted]) + "\n)"


def render(job: BatchJob) -> str:
    """The sbatch script. Raises UserError for a value that cannot be written into it."""
    options, submission = job.options, job.submission
    inside, before = container(job)
    srun = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    # Every rank sees its node's GPUs and cores, uses its own GPU and stays on the cores near it.
    srun += ["--gpu-bind=none", "--cpu-bind=none"] if options.gpus_per_node else []
    settings = {
        "REPOSITORY": str(ROOT),
        "RUN": str(job.run_dir),
        "SUBMISSION": str(submission),
        "PYTHON": choose_python(options),
        "RANKS": str(options.nodes * job.tasks_per_node),
        "PREFLIGHT": "no" if options.no_preflight else "yes",
        "CHAINED": "yes" if options.chain > 1 else "no",
        "MAX_REQUEUES": str(options.max_requeues),
        "SIGNAL_SECONDS": str(options.signal_seconds),
        "HEAD": options.master_addr or "",
        "PORT": str(options.master_port or ""),
    }
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *directives(job),
            *(f"#SBATCH {checked('--extra-sbatch', line)}" for line in options.extra_sbatch),
            "",
            comment(f"{options.recipe} on {options.nodes * job.tasks_per_node} ranks; megalite {code_version()}"),
            *(f"{name}={shell(name, value) if value else ''}" for name, value in settings.items()),
            _array("RECIPE", [f"{submission}.toml", "--run.dir", str(job.run_dir), *job.overrides]),
            _array("SRUN", [*srun, *inside, *options.extra_srun]),
            _array("CONTAINER", before),
            *_environment(job),
            "",
            BODY.read_text(encoding="utf-8"),
        ]
    )


def _environment(job: BatchJob) -> list[str]:
    """Lines that set the ranks' surroundings up."""
    options = job.options
    values: dict[str, str] = {"OMP_NUM_THREADS": str(job.cpus_per_task or 1), "NCCL_DEBUG": "WARN"}
    values |= GPU_ENVIRONMENT if options.gpus_per_node else {}
    if options.ifname:
        values |= {"NCCL_SOCKET_IFNAME": options.ifname, "GLOO_SOCKET_IFNAME": options.ifname}
    values |= dict(entry.split("=", 1) for entry in options.env)
    lines = [f"export {name}={shell(f'--env {name}', value)}" for name, value in values.items()]
    return lines + ([f"source {shell('--setup', os.path.abspath(options.setup))}"] if options.setup else [])
