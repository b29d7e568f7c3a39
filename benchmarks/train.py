"""Training speed on CPUs and GPUs: megalite, yardsticks and peers on the same model and tokens, in one run.

    python benchmarks/train.py [--model 10m] [--rows ROW ...] [--against picotron=PATH transformers] [--rounds 3]

A row is a runner with options, such as `megalite`, `megalite,tensor=2,precision=bf16` or `plain,compile=1`. Runners
are megalite, plain (plain PyTorch, benchmarks/plain.py), bare (megalite's operations in one flat function) and the
peers named by `--against`. Options: tensor, pipeline, data (ranks along each), precision, compile, kernels, recompute,
schedule, sequence, micro_batch, layers. Every row runs in fresh processes with the environment that megalite's launcher
sets; the rows take turns, `--rounds` times over, so that a busy machine slows all alike. A `plain` row is added for
every precision among the rows, and without `--rows` a peer gets one for each layout. docs/throughput.md explains the
numbers.
"""

from __future__ import annotations

import contextlib
import json
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
import tyro
from rich.console import Console
from train_job import AXES, PRESETS, Job
from train_report import draw, matmul_rates, summarise, tabulate

from megalite.errors import UserError, exit_on_user_error
from megalite.model.cost import FORMULA

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


@dataclass
class Arguments:
    """Measure training speed; the rows take turns."""

    model: str = "10m"
    """10m, 124m, 1.24b, gpt2-1.5b or llama3-8b (as many of its layers as fit)."""
    rows: tuple[str, ...] = ()
    """Rows, as above; none: the layouts and precisions that the device makes sense of."""
    against: tuple[str, ...] = ()
    """Peers to run beside: NAME of an installed one, or NAME=PATH of a checkout."""
    rounds: int = 3
    """How often the rows take turns."""
    steps: int = 5
    """Measured steps of a row in each turn."""
    warmup: int = 3
    """Steps before them."""
    device: str = "auto"
    """cpu, cuda or auto."""
    output: Path | None = None
    """Write NAME.json, and the plot beside it as NAME.png."""


def layers_that_fit(model: str, device: str) -> int:
    """Layers of the preset that fit one device in training: 18 bytes a parameter, and the activations kept."""
    preset = PRESETS[model]
    shape = preset.model
    if device == "cpu":
        return int(shape["layers"])
    hidden, ffn, vocabulary = shape["hidden_size"], shape["ffn_hidden_size"], shape["vocab_size"]
    kv = hidden * shape["kv_heads"] // shape["heads"]
    weights = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    tokens = preset.micro_batch * preset.seq_length
    layer = 18 * weights + 2 * tokens * (7 * hidden + 2 * kv + 3 * ffn)
    ends = 18 * vocabulary * hidden * (1 if shape.get("tie_embeddings") else 2) + (6 << 30)
    room = 0.92 * torch.cuda.get_device_properties(0).total_memory - ends
    return max(1, min(int(shape["layers"]), int(room // layer)))


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


def parse_row(text: str, arguments: Arguments, device: str, paths: dict[str, str]) -> Job:
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
        elif name in ("precision", "kernels", "recompute", "schedule"):
            chosen[name] = value
        elif name in ("compile", "sequence", "micro_batch", "layers") and value.isdigit():
            chosen[name] = bool(int(value)) if known[name].type == "bool" else int(value)
        else:
            raise UserError(f"--rows {text}: {option!r} is no option; see --help")
    layout = {axis: size for axis, size in layout.items() if size > 1}
    if layout and runner in ONE_PROCESS:
        raise UserError(f"--rows {text}: {runner} runs in one process; leave out {', '.join(layout)}")
    if chosen.get("compile") and runner != "plain":
        raise UserError(f"--rows {text}: compile is the plain runner's; {runner} brings its own kernels")
    if runner == "bare" and (chosen["precision"], device) != ("fp32", "cpu"):
        raise UserError(f"--rows {text}: the bare loop is for fp32 on CPUs")
    chosen.setdefault("layers", layers_that_fit(arguments.model, device))
    return Job(
        runner=runner,
        model=arguments.model,
        layout=layout,
        device=device,
        warmup=arguments.warmup,
        steps=arguments.steps,
        peer_path=paths.get(runner, ""),
        **chosen,
    )


def choose_rows(arguments: Arguments, device: str, paths: dict[str, str]) -> dict[str, Job]:
    """Row -> what it runs. Yardsticks and peers that were not asked for one by one are added."""
    texts = list(arguments.rows)
    if not texts:
        texts = [*CPU_ROWS, *CPU_ROWS_BF16] if device == "cpu" else list(GPU_ROWS)
        for peer in paths:
            for precision in ("fp32", "bf16") if device == "cpu" else ("bf16",):
                texts += [f"{peer}{layout},precision={precision}" for layout in PEER_LAYOUTS[peer]]
    jobs = {text: parse_row(text, arguments, device, paths) for text in texts}
    for precision in sorted({job.precision for job in jobs.values()}):
        if not any(job.runner == "plain" and job.precision == precision for job in jobs.values()):
            text = f"plain,precision={precision}"
            jobs[text] = parse_row(text, arguments, device, paths)
    return jobs


def run_once(text: str, job: Job) -> list[dict[str, Any]]:
    """One turn of a row in its own processes: what each rank measured."""
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
            while not all(process.poll() == 0 for process in processes):
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
        for rank, process in enumerate(processes):
            if process.wait() > 0:
                last = Path(f"{folder}/error{rank}").read_text().strip().splitlines()[-1:]
                raise UserError(f"row {text}, rank {rank} failed: {' '.join(last) or process.returncode}")
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
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    facts = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    if device != "cpu":
        processor = torch.cuda.get_device_name(0)
    used = " ".join(word.partition("=")[0] if word.startswith("picotron=") else word for word in sys.argv[1:])
    return Machine(
        device, processor, len(os.sched_getaffinity(0)), commit=commit, command=f"benchmarks/train.py {used}"
    )


@exit_on_user_error
def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the row under way ends, too
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.model not in PRESETS:
        raise UserError(f"--model {arguments.model}: no such model; known: {', '.join(PRESETS)}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use --device cpu")
    jobs = choose_rows(arguments, device, peer_paths(arguments.against))
    machine = describe(device)
    machine.matmul_tflops = matmul_rates(next(iter(jobs.values())), sorted({job.precision for job in jobs.values()}))
    console = Console(width=None if sys.stdout.isatty() else 200)
    turns: dict[str, list[list[dict[str, Any]]]] = {text: [] for text in jobs}
    for turn in range(arguments.rounds):
        for text, job in jobs.items():
            console.print(f"round {turn + 1} of {arguments.rounds}: {text}", style="dim")
            turns[text].append(run_once(text, job))
    rows = {text: summarise(job, turns[text], machine.matmul_tflops[job.precision]) for text, job in jobs.items()}
    result = {"machine": asdict(machine), "model": arguments.model, "mfu": FORMULA, "rows": rows}
    tabulate(result, jobs, console)
    if arguments.output is not None:
        path = arguments.output.with_suffix(".json")
        path.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, jobs, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
