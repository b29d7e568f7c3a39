"""Train on a SLURM cluster: writes one plain sbatch script for a recipe, and shows it or submits it.

    python launch/slurm.py --recipe launch/recipes/llama3-8b-64gpu.toml --nodes 8 --time 24:00:00 --dry-run
    python launch/slurm.py --recipe R --nodes N [options] [-- --SECTION.FIELD VALUE ...]

What follows `--` overrides the recipe. Runs on a login node with nothing but Python 3.11: no torch, no installation.
A submission leaves RUN/launch/001.sbatch and 001.toml (the recipe as it was), then 002 and so on. The script is these
settings (launch/sbatch.py) followed by launch/job.sh, where the ways in which a job ends and goes on are written down.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.sbatch import BatchJob, checked, render  # noqa: E402
from megalite.cli import Parser, program, whole  # noqa: E402
from megalite.errors import UserError  # noqa: E402
from megalite.files import write_atomically  # noqa: E402

try:
    import tomllib
except ModuleNotFoundError:
    print(f"error: Python {sys.version.split()[0]} runs this; 3.11 or newer is needed", file=sys.stderr)
    raise SystemExit(2) from None

_OVERRIDE = re.compile(r"--([a-z]\w*)[.]([a-z]\w*)", re.ASCII)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def parser() -> Parser:
    result = Parser(__doc__, prog="python launch/slurm.py", overrides=pair_overrides)
    add = result.add_argument
    add("--recipe", required=True, metavar="FILE", help="TOML file, such as those in launch/recipes")
    add("--nodes", required=True, type=whole(1, 65535), metavar="N")
    add(
        "--gpus-per-node",
        type=whole(0, 65535),
        default=8,
        metavar="G",
        help="one rank each; 0 trains on CPUs (default 8)",
    )
    add(
        "--tasks-per-node",
        type=whole(1, 65535),
        metavar="T",
        help="ranks a node; by default one for each GPU, or 1 on CPUs",
    )
    what = result.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the script; touch nothing")
    what.add_argument("--test-only", action="store_true", help="let SLURM check the script (sbatch --test-only)")
    add = result.add_argument_group("several jobs").add_argument
    add(
        "--chain", type=whole(1, 65535), default=1, metavar="K", help="K jobs that follow each other, a time limit each"
    )
    add("--sweep", action="append", default=[], metavar="FIELD=A,B,C", help="a run for each value; repeated: each pair")
    add = result.add_argument_group("sbatch options, handed on as they are").add_argument
    for option in ("partition", "account", "qos", "constraint", "exclude", "reservation", "mem", "dependency"):
        add(f"--{option}")
    add("--time", metavar="D-HH:MM:SS", help="limit of one start; the run goes on in the next")
    add(
        "--cpus-per-task",
        type=whole(1, 65535),
        metavar="C",
        help="default: 8 for a rank on a GPU, SLURM's own (1) on CPUs",
    )
    add("--exclusive", action="store_true", help="whole nodes")
    add("--job-name", metavar="NAME", help="default: the run directory's name")
    add(
        "--extra-sbatch", action="append", default=[], metavar="OPTION", help="written --extra-sbatch=--x=y; repeatable"
    )
    add("--extra-srun", action="append", default=[], metavar="OPTION", help="written --extra-srun=--x=y; repeatable")
    add = result.add_argument_group("stopping and going on").add_argument
    add(
        "--signal-seconds",
        type=whole(1, 65535),
        default=300,
        metavar="S",
        help="save so long before the limit (default 300)",
    )
    add(
        "--max-requeues",
        type=whole(0, 65535),
        default=3,
        metavar="M",
        help="failures in a row that are forgiven where no new checkpoint came between (default 3)",
    )
    add = result.add_argument_group("the ranks' surroundings").add_argument
    add("--python", metavar="PROGRAM", help="default: the active environment's, else .venv's, else python3")
    add("--setup", metavar="FILE", help="shell file sourced at the job's start: modules, environments, NCCL variables")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="exported to the ranks; can be repeated")
    add("--ifname", metavar="NAME", help="network interface for rendezvous (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)")
    add("--master-addr", metavar="HOST", help="where the ranks meet; default: the job's first host")
    add("--master-port", type=whole(1024, 65535), metavar="PORT", help="default: made from job id and restart count")
    add("--no-preflight", action="store_true", help="do not look at the nodes (tools/doctor.py) before training")
    add("--container-image", metavar="IMAGE")
    add("--container-mounts", metavar="A:B,...", help="besides the repository, the run and the working directory")
    add("--container-runtime", choices=("pyxis", "apptainer"), help="default: apptainer for .sif images, else pyxis")
    return result


def seconds_of(time: str) -> int:
    """Seconds of a SLURM time: minutes, minutes:seconds, hours:minutes:seconds, and the three with days before."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time {time} is not a time; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *rest = (int(part) if part else None for part in match.groups())
    first, second, third = rest
    if days is None and third is None:
        return (first or 0) * 60 + (second or 0)
    return (days or 0) * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)


def check_options(options: argparse.Namespace) -> None:
    """Refuse what is wrong by itself; nothing here looks at files but at the setup's."""
    for name, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            option = f"--{name.replace('_', '-')}"
            if isinstance(text, str) and not checked(option, text).strip():
                raise UserError(f"{option} is empty; give a value or leave it out")
    if options.time is not None and seconds_of(options.time) <= options.signal_seconds:
        raise UserError(
            f"--time {options.time} leaves nothing beside --signal-seconds {options.signal_seconds}; "
            "give more time, or fewer seconds for the last checkpoint"
        )
    for entry in options.env:
        if not _VARIABLE.fullmatch(entry.partition("=")[0]) or "=" not in entry:
            raise UserError(f"--env {entry} is not NAME=VALUE")
    if options.setup is not None and not Path(options.setup).is_file():
        raise UserError(f"--setup {options.setup} does not exist; give a shell file that every node can read")
    if options.container_image is None:
        for name in ("container_mounts", "container_runtime"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is given without --container-image; name the image")


def read_recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--recipe {path} does not exist; see launch/recipes") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--recipe {path} cannot be read: {error}") from None


def pair_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(`section.field`, value) of the arguments after `--`, as the trainer spells them."""
    pairs, rest = [], list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        match = _OVERRIDE.fullmatch(option.replace("-", "_").replace("__", "--", 1))
        if match is None:
            raise UserError(f"{option!r} is not understood; overrides are written --section.field value")
        if not equals:
            if not rest:
                raise UserError(f"{option} has no value")
            value = rest.pop(0)
        field = f"{match[1]}.{match[2]}"
        pairs.append((field, checked(field, value)))
    return pairs


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets and quotation marks."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def sweep_points(sweeps: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Every combination of the values, as overrides; one empty point without a sweep."""
    axes = []
    for sweep in sweeps:
        field, equals, text = sweep.partition("=")
        values = split_values(text)
        if not equals or not _OVERRIDE.fullmatch(f"--{field}") or "" in values:
            raise UserError(f"--sweep {sweep} is not understood; write for instance --sweep optimizer.lr=1e-4,3e-4")
        if len(set(values)) < len(values):
            raise UserError(f"--sweep {sweep} names a value twice")
        axes.append([(field, value) for value in values])
    for point in itertools.product(*axes):
        yield list(point)


def check_recipe(recipe: Path, overrides: Sequence[str], ranks: int) -> None:
    """The trainer's own check of fields and layout, where its small libraries are installed on this machine."""
    try:
        from megalite.config import load_config
        from megalite.config.check import check_layout
    except ModuleNotFoundError:
        return  # the job refuses the same, with exit code 2
    check_layout(load_config(recipe, overrides), ranks)


def plan_jobs(options: argparse.Namespace) -> list[BatchJob]:
    """The runs that were asked for, checked."""
    check_options(options)
    recipe = Path(options.recipe)
    tables = read_recipe(recipe)
    given = pair_overrides(options.overrides)
    tasks = options.tasks_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and tasks != options.gpus_per_node:
        raise UserError(f"--tasks-per-node {tasks}: one rank runs on each of --gpus-per-node {options.gpus_per_node}")
    section = tables.get("run", {})
    base = dict(given).get("run.dir") or (section.get("dir") if isinstance(section, dict) else None)
    base = os.path.abspath(checked("run.dir", str(base or f"runs/{recipe.stem}")))
    jobs = []
    for point in sweep_points(options.sweep):
        suffix = "".join(f"-{field.rpartition('.')[2]}-{value}" for field, value in point)
        run_dir = Path(base + re.sub(r"[^\w.+-]+", "_", suffix))
        fields = {field: value for field, value in [*given, *point] if field != "run.dir"}
        overrides = tuple(word for field, value in fields.items() for word in (f"--{field}", value))
        check_recipe(recipe, overrides, options.nodes * tasks)
        name = re.sub(r"[^\w.+-]+", "_", options.job_name or run_dir.name)
        jobs.append(BatchJob(options, name, run_dir, overrides, tasks))
    return jobs


def _sbatch(arguments: Sequence[str], script: str | None = None) -> str:
    """What sbatch prints; its refusal as a user's mistake."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on the path; run this on a login node, or look at the script with --dry-run")
    done = subprocess.run(["sbatch", *arguments], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.strip().splitlines()]
        raise UserError("sbatch refuses the job: " + " ".join(lines))
    return (done.stdout + done.stderr).strip()


def submit(job: BatchJob) -> None:
    """Write the script and the recipe beside it, and submit the chain's jobs to SLURM."""
    submission, script = job.submission, render(job)
    files = {submission.with_suffix(".toml"): Path(job.options.recipe).read_bytes()}
    files[submission.with_suffix(".sbatch")] = script.encode()
    identities: list[str] = []
    try:
        submission.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write_atomically(path, content)
        for _ in range(job.options.chain):
            order = [f"afterany:{identities[-1]}"] if identities else [job.options.dependency]
            after = [f"--dependency={order[0]}"] if order[0] else []
            answer = _sbatch(["--parsable", *after, str(submission.with_suffix(".sbatch"))])
            identities.append(answer.splitlines()[0].partition(";")[0])
    except OSError as error:
        raise UserError(f"{job.run_dir} cannot be written: {error}") from None
    finally:
        if not identities:
            for path in files:
                path.unlink(missing_ok=True)
    print(f"job {' then '.join(identities)}: {submission}.sbatch")
    print(f"  to follow: tail -F {job.run_dir}/launch/slurm-{identities[0]}.out")
    print(f"  to save and stop: scancel --batch --signal=INT {identities[0]}")


@program
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    for job in plan_jobs(options):
        if options.dry_run:
            print(render(job), end="")
        elif options.test_only:
            print(_sbatch(["--test-only"], render(job)))
        else:
            submit(job)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
