"""Training speed on CPUs and GPUs: megalite, yardsticks and peers on the same model and tokens, in one run.

    python benchmarks/train.py [--model 10m] [--rows ROW ...] [--against picotron=PATH transformers] [--rounds 3]

A row is a runner with options, such as `megalite`, `megalite,tensor=2,precision=bf16` or `plain,compile=1`. Runners are
megalite, plain (plain PyTorch, benchmarks/plain.py), bare (megalite's operations in one flat function) and the peers
named by `--against`. Options: tensor, pipeline, context, expert, data (ranks along each), precision, fp8, compile,
cuda_graph, kernels, recompute, schedule, sequence, context_mode, micro_batch, layers. Every row runs in fresh processes
with the environment that megalite's launcher sets; the rows take turns, `--rounds` times over, so that a busy machine
slows all alike. A `plain` row is added for every precision among the rows (not to models with experts), and without
`--rows` a peer gets one for each layout.
docs/throughput.md explains the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from provenance import commit
from rich.console import Console
from train_job import AXES, PRESETS, Job
from train_report import draw, summarise, tabulate

from megalite.cli import Parser, program
from megalite.errors import UserError
from megalite.files import write_atomically, write_errors_named
from megalite.model.cost import FORMULA
from megalite.train.step_graph import WARM_UP

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from launch.local import rank_environment  # noqa: E402

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
OWN = ("megalite", "plain", "bare")
PEERS = {"picotron": HERE / "peers" / "run_picotron.py", "transformers": HERE / "peers" / "run_transformers.py"}
ONE_PROCESS = ("plain", "bare", "transformers")

CPU_ROWS = (
    "megalite",
    "megalite,tensor=2",
    "megalite,tensor=2,sequence=0",
    "megalite,pipeline=2",
    "megalite,data=2",
    "bare",
)
CPU_ROWS_BF16 = tuple(f"megalite{layout},precision=bf16" for layout in ("", ",tensor=2", ",pipeline=2", ",data=2"))
GPU_ROWS = ("megalite,precision=bf16", "plain,precision=bf16,compile=1")
PEER_LAYOUTS = {"picotron": ("", ",tensor=2", ",pipeline=2", ",data=2"), "transformers": ("",)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", default="10m", choices=tuple(PRESETS), help="what is trained; on a GPU llama3-8b has 8 layers")
    add("--rows", nargs="+", default=[], metavar="ROW", help="none: what the device makes sense of")
    add("--layers", type=int, default=0, metavar="N", help="layers of every row that does not say so itself")
    add("--against", nargs="+", default=[], metavar="PEER", help="NAME of an installed one, or NAME=PATH of a checkout")
    add("--rounds", type=int, default=3, help="how often the rows take turns (default 3)")
    add("--steps", type=int, default=5, help="measured steps of a row in each turn (default 5)")
    add("--warmup", type=int, default=3, help="steps before them (default 3)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--budget", type=float, default=math.inf, metavar="S", help="begin no turn later, and end the one under way")
    add("--output", type=Path, metavar="FILE", help="write FILE.json after every turn, and at the end FILE.png")
    options = parser.parse_args(argv)
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is below 1")
    return options


def peer_paths(against: Sequence[str]) -> dict[str, str]:
    """Peer -> the checkout that the user named, or nothing where it is installed."""
    paths = {}
    for text in against:
        name, _, path = text.partition("=")
        if name not in PEERS:
            raise UserError(f"--against {name}: no such peer; known: {', '.join(PEERS)}")
        if name == "picotron" and not Path(path, "picotron", "model.py").is_file():
            raise UserError(f"--against {text}: give the path of a checkout, picotron=PATH")
        paths[name] = str(Path(path).resolve()) if path else ""
    return paths


def parse_row(text: str, arguments: argparse.Namespace, device: str, paths: dict[str, str]) -> Job:
    runner, *options = text.split(",")
    if runner not in (*OWN, *paths):
        raise UserError(f"--rows {text}: no runner {runner!r}; known: {', '.join((*OWN, *paths))} (see --against)")
    known = {entry.name: entry for entry in fields(Job)}
    chosen: dict[str, Any] = {"precision": "fp32" if device == "cpu" else "bf16"}
    layout: dict[str, int] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name in AXES and value.isdigit() and int(value) > 0:
            layout[name] = int(value)
        elif name in ("precision", "fp8", "kernels", "recompute", "schedule", "context_mode"):
            chosen[name] = value
        elif name in ("compile", "cuda_graph", "sequence", "micro_batch", "layers") and value.isdigit():
            chosen[name] = bool(int(value)) if known[name].type == "bool" else int(value)
        else:
            raise UserError(f"--rows {text}: {option!r} is no option; see --help")
    layout = {axis: size for axis, size in layout.items() if size > 1}
    if layout and runner in ONE_PROCESS:
        raise UserError(f"--rows {text}: {runner} runs in one process; leave out {', '.join(layout)}")
    if chosen.get("compile") and runner != "plain":
        raise UserError(f"--rows {text}: compile is the plain runner's; {runner} brings its own kernels")
    if chosen.get("fp8", "none") != "none" and runner != "megalite":
        raise UserError(f"--rows {text}: fp8 is megalite's; {runner} has other products")
    if chosen.get("cuda_graph") and (runner != "megalite" or device == "cpu"):
        raise UserError(f"--rows {text}: cuda_graph is megalite's, on a GPU")
    if runner != "megalite" and PRESETS[arguments.model].model.get("experts"):
        raise UserError(f"--rows {text}: {runner} has no experts; --model {arguments.model} is megalite's alone")
    if runner == "bare" and (chosen["precision"], device) != ("fp32", "cpu"):
        raise UserError(f"--rows {text}: the bare loop is for fp32 on CPUs")
    preset = PRESETS[arguments.model]
    usual = preset.gpu_layers if device == "cuda" else 0
    chosen.setdefault("layers", arguments.layers or usual or preset.model["layers"])
    return Job(
        runner=runner,
        model=arguments.model,
        layout=layout,
        device=device,
        warmup=max(arguments.warmup, WARM_UP + 2) if chosen.get("cuda_graph") else arguments.warmup,
        steps=arguments.steps,
        peer_path=paths.get(runner, ""),
        **chosen,
    )


def choose_rows(arguments: argparse.Namespace, device: str, paths: dict[str, str]) -> dict[str, Job]:
    """Row -> what it runs. Yardsticks and peers that were not asked for one by one are added."""
    texts = list(arguments.rows)
    if not texts:
        texts = [*CPU_ROWS, *CPU_ROWS_BF16] if device == "cpu" else list(GPU_ROWS)
        for peer in paths:
            for precision in ("fp32", "bf16") if device == "cpu" else ("bf16",):
                texts += [f"{peer}{layout},precision={precision}" for layout in PEER_LAYOUTS[peer]]
    jobs = {text: parse_row(text, arguments, device, paths) for text in texts}
    if PRESETS[arguments.model].model.get("experts"):
        return jobs  # the yardsticks are dense
    for precision in sorted({job.precision for job in jobs.values()}):
        if not any(job.runner == "plain" and job.precision == precision for job in jobs.values()):
            text = f"plain,precision={precision}"
            jobs[text] = parse_row(text, arguments, device, paths)
    return jobs


def run_once(text: str, job: Job, limit: float = math.inf) -> list[dict[str, Any]]:
    """One turn of a row in its own processes: what each rank measured. Raises UserError where it fails or takes more
    than `limit` seconds."""
    program = PEERS.get(job.runner, HERE / "train_worker.py")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        own = job.replace(store=f"{folder}/store")
        shared = {**rank_environment(job.ranks, 0 if job.device == "cpu" else job.ranks), **LOOPBACK, **os.environ}
        processes = []
        for rank in range(job.ranks):
            out, error = (files.enter_context(open(f"{folder}/{name}{rank}", "w")) for name in ("out", "error"))
            environment = {**shared, "RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
            command = [sys.executable, str(program), own.to_json()]
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=error))
        try:
            begun = time.monotonic()
            while not all(process.poll() == 0 for process in processes):
                if any(process.poll() for process in processes):
                    break
                if time.monotonic() - begun > limit:
                    raise UserError(f"row {text} was not done after {limit:.0f} s, the end of --budget")
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.wait() > 0:
                lines = Path(f"{folder}/error{rank}").read_text().strip().splitlines()
                told = [line for line in lines if "Error" in line] or lines
                raise UserError(f"row {text}, rank {rank} failed: {told[-1] if told else process.returncode}")
        return [json.loads(Path(f"{folder}/out{rank}").read_text().splitlines()[-1]) for rank in range(job.ranks)]


@dataclass
class Machine:
    """Where the numbers are from."""

    device: str
    processor: str
    cores: int
    torch: str = torch.__version__
    python: str = platform.python_version()
    commit: str = ""
    command: str = ""
    matmul_tflops: dict[str, float] = field(default_factory=dict)


def describe(device: str) -> Machine:
    facts = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    used = " ".join(word.partition("=")[0] if word.startswith("picotron=") else word for word in sys.argv[1:])
    return Machine(
        device, processor, len(os.sched_getaffinity(0)), commit=commit(), command=f"benchmarks/train.py {used}"
    )


class Comparison:
    """The rows' turns, and the document that is written after each of them."""

    def __init__(self, arguments: argparse.Namespace, jobs: dict[str, Job], machine: Machine) -> None:
        self.arguments, self.jobs, self.machine = arguments, jobs, machine
        self.turns: dict[str, list[list[dict[str, Any]]]] = {text: [] for text in jobs}
        self.errors: dict[str, str] = {}
        self._deadline = time.monotonic() + arguments.budget

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def measure_products(self) -> None:
        """What the device's products reach, in processes of their own: this one must hold no memory of the device."""
        any_job = next(iter(self.jobs.values()))
        for precision in sorted({job.precision for job in self.jobs.values()}):
            products = any_job.replace(runner="products", layout={}, precision=precision)
            (measured,) = run_once("products", products, self.left)
            self.machine.matmul_tflops[precision] = measured["tflops"]
            self.machine.processor = measured["device"] or self.machine.processor

    def turn(self, text: str) -> None:
        """One turn of a row that has not failed yet; a failure is what the row then tells."""
        try:
            self.turns[text].append(run_once(text, self.jobs[text], self.left))
        except UserError as error:
            self.errors[text] = str(error)
        self.write()

    def result(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for text, job in self.jobs.items():
            turns = self.turns[text]
            rows[text] = summarise(job, turns, self.machine.matmul_tflops[job.precision]) if turns else {}
            if text in self.errors:
                rows[text]["error"] = self.errors[text]
        model = self.arguments.model
        return {"machine": asdict(self.machine), "model": model, "mfu": FORMULA, "rows": rows}

    def write(self, result: dict[str, Any] | None = None) -> None:
        if self.arguments.output is not None:
            path = self.arguments.output.with_suffix(".json")
            with write_errors_named(path):
                write_atomically(path, json.dumps(result or self.result(), indent=1) + "\n")


@program
def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the row under way ends, too
    arguments = parse()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use --device cpu")
    jobs = choose_rows(arguments, device, peer_paths(arguments.against))
    comparison = Comparison(arguments, jobs, describe(device))
    comparison.measure_products()
    console = Console(width=None if sys.stdout.isatty() else 200)
    for turn in range(arguments.rounds):
        for text in jobs:
            if text not in comparison.errors and comparison.left > 0:
                console.print(f"round {turn + 1} of {arguments.rounds}: {text}", style="dim")
                comparison.turn(text)
    result = comparison.result()
    tabulate(result, jobs, console)
    comparison.write(result)
    if arguments.output is not None:
        draw(result, jobs, arguments.output.with_suffix(".png"))
    return 1 if comparison.errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
