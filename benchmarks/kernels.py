"""Measure the kernels against their peers, all in one run, interleaved: JSON, a table and a plot.

    python benchmarks/kernels.py [--device cuda|cpu] [--only rms_norm,attention] [--samples 30] [--out DIR]

Every case is timed `--samples` times in turns with its peers, each sample after the caches were flushed by writes of
1 GiB (64 MiB on a CPU): median, 20th and 80th percentile. A CPU's times are CPU seconds of this process, which a
machine shared with others disturbs least. Achieved bytes/s and flop/s count what the operation must move or multiply at
least (docs/kernels.md), against the copy bandwidth and matrix-product rate of the same run. Peers that are not
installed, or refuse a case, are named with the case and left out. The files are written anew after every group, so that
a run that is stopped leaves what it has measured.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from clock import Clock, copy_rate
from kernel_cases import GROUPS
from kernel_setting import LLAMA_8B, SMALL, Case, Setting, optional

from megalite.kernels import select_kernels

WARM_UP = 3


def measure(case: Case, clock: Clock, samples: int) -> dict[str, dict[str, float]]:
    """Seconds per implementation: warmed up, then taken in turns."""
    times: dict[str, list[float]] = {who: [] for who in case.implementations}
    for turn in range(samples + WARM_UP):
        for who, call in case.implementations.items():
            if case.prepare:
                case.prepare()
            taken = clock(call)
            if turn >= WARM_UP:
                times[who].append(taken)
    cut = {who: statistics.quantiles(values, n=5, method="inclusive") for who, values in times.items()}
    return {who: {"median": statistics.median(times[who]), "p20": cut[who][0], "p80": cut[who][3]} for who in times}


def peak_bytes(case: Case) -> dict[str, int]:
    """What each implementation allocates at its peak, beyond what is there before; CUDA only."""
    peaks = {}
    for who, call in case.implementations.items():
        if case.prepare:
            case.prepare()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peaks[who] = torch.cuda.max_memory_allocated() - before
    return peaks


def ceilings(device: torch.device, dtype: torch.dtype, clock: Clock) -> dict[str, float]:
    """Copy bandwidth in bytes/s and matrix-product rate in flop/s, the best of ten."""
    n = 8192 if device.type == "cuda" else 1024
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = min(clock(lambda: x @ y) for _ in range(10))
    return {"copy_bytes_per_second": copy_rate(device, clock), "matmul_flop_per_second": 2 * n**3 / product}


def row(case: Case, times: dict[str, dict[str, float]], limits: dict[str, float]) -> dict[str, Any]:
    ours, *peers = times
    median = times[ours]["median"]
    result: dict[str, Any] = {"case": case.name, "ours": ours, "seconds": times, "absent": case.absent}
    if case.bytes:
        result["bytes_per_second"] = case.bytes / median
        result["of_copy_bandwidth"] = case.bytes / median / limits["copy_bytes_per_second"]
    if case.flop:
        result["flop_per_second"] = case.flop / median
        result["of_matmul_rate"] = case.flop / median / limits["matmul_flop_per_second"]
    result["times_faster_than"] = {who: times[who]["median"] / median for who in peers}
    return result


def line(result: dict[str, Any]) -> str:
    ours = result["seconds"][result["ours"]]
    moves = "of_copy_bandwidth" in result
    share = result["of_copy_bandwidth" if moves else "of_matmul_rate"]
    rate = result["bytes_per_second" if moves else "flop_per_second"] / 1e12
    peers = "  ".join(f"{who} {ratio:.2f}x" for who, ratio in result["times_faster_than"].items())
    return (
        f"{result['case']:<48} {result['ours']:<20}{ours['median'] * 1e6:>10.1f} us [{ours['p20'] * 1e6:.1f}, "
        f"{ours['p80'] * 1e6:.1f}] {rate:>8.3f} {'TB/s    ' if moves else 'TFLOP/s '}{share:>5.2f} of "
        f"{'copy' if moves else 'matmul':<7} {peers}"
    ).rstrip()


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{r['case']} vs {who}", ratio) for r in results for who, ratio in r["times_faster_than"].items()]
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(bars) + 1.2))
    axes.barh([label for label, _ in bars][::-1], [ratio for _, ratio in bars][::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("peer's time / ours (above 1: ours is faster)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def clocks() -> str:
    """The device's clocks and power limit now, as nvidia-smi tells them."""
    query = "clocks.sm,clocks.mem,power.limit,temperature.gpu,driver_version"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "not told"
    except (OSError, subprocess.TimeoutExpired):
        return "not told"


def machine(device: torch.device) -> dict[str, str]:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return result.stdout.strip()

    def version(name: str) -> str:
        module = optional(name)
        return "absent" if module is None else str(getattr(module, "__version__", "unknown"))

    changed = " (changed)" if git("status", "--porcelain", "../kernels") else ""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: version(name) for name in ("triton", "liger_kernel", "flash_attn")},
        "commit": (git("rev-parse", "HEAD") or "unknown") + changed,
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }


def write(stem: Path, document: dict[str, Any]) -> None:
    """JSON, table and plot; a reader never sees half a file."""
    results = document["results"]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(document, indent=2)), (".txt", "\n".join(map(line, results)))):
        part = stem.with_suffix(f"{suffix}.part")
        part.write_text(text + "\n")
        part.replace(stem.with_suffix(suffix))
    if any(result["times_faster_than"] for result in results):
        plot(results, stem.with_suffix(".png"))


def run(setting: Setting, groups: list[str], samples: int, stem: Path) -> None:
    clock = Clock(setting.device)
    document: dict[str, Any] = {
        **machine(setting.device),
        **ceilings(setting.device, setting.dtype, clock),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "samples": samples,
        "times": "seconds of the device" if clock.cuda else "CPU seconds of the process",
        "choices": dict(setting.kernels.choices),
        "results": [],
    }
    if clock.cuda:
        document["clocks"] = {"before": clocks()}
    print(json.dumps(document, indent=2))
    for name in groups:
        for case in GROUPS[name](setting):
            result = row(case, measure(case, clock, samples), document)
            if clock.cuda:
                result["peak_bytes"] = peak_bytes(case)
            document["results"].append(result)
            print(line(result), flush=True)
        if clock.cuda:
            document["clocks"]["after"] = clocks()
        write(stem, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, of: {', '.join(GROUPS)}")
    parser.add_argument("--samples", type=int, default=30, help="of each implementation, at least 2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile as a peer"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    groups = options.only.split(",")
    if unknown := sorted(set(groups) - set(GROUPS)):
        parser.error(f"--only {','.join(unknown)}: no such group; known: {', '.join(GROUPS)}")
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: percentiles need at least 2")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with_compile = options.device == "cuda" if options.compile is None else options.compile
    kernels = select_kernels({"attention": "triton"} if device.type == "cuda" else {}, device)
    setting = Setting(kernels, device, dtype, LLAMA_8B if device.type == "cuda" else SMALL, with_compile)
    run(setting, groups, options.samples, options.out / f"kernels_{options.device}_{options.dtype}")


if __name__ == "__main__":
    main()
