"""What one machine is and has: versions, compiler, extension, disk, limits, and how fast it multiplies."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megalite.affinity import LEAST_CORES, own_cores
from megalite.doctor.findings import FAULT, OK, WARNING, Finding
from megalite.kernels import native
from megalite.observe.formatting import counted

_PACKAGES = ("torch", "triton", "numpy", "megalite")
_GPU_SIZE, _CPU_SIZE = 8192, 1024
_MEASURE_SECONDS = 0.4
_PROBE_BYTES = 1 << 24
_LEAST_FREE = 10 * 2**30


def versions() -> dict[str, str]:
    """What must be the same on every node of a job."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    found["CUDA"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def look_at_software(host: str) -> Iterator[Finding]:
    """Versions, compiler, extension."""
    found = versions()
    yield Finding(OK, "versions", host, ", ".join(f"{name} {version}" for name, version in found.items()))
    compiler = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )
    if compiler:
        yield Finding(OK, "compiler", host, compiler)
    else:
        remedy = "install g++ (Debian, Ubuntu: apt install g++)"
        yield Finding(
            WARNING, "compiler", host, "no C++ compiler on the path", f"{remedy}; Triton and installing need it"
        )
    try:
        for extension in ("megalite.data._index", "megalite.text._bpe"):
            importlib.import_module(extension)
        yield Finding(OK, "C++ extension", host, "built")
    except ImportError as error:
        yield Finding(FAULT, "C++ extension", host, str(error).splitlines()[0], "run: pip install -e .")
    if missing := native.obstacle():
        yield Finding(WARNING, "CPU kernels", host, missing, "run: pip install -e . (slower PyTorch forms until then)")
    else:
        yield Finding(OK, "CPU kernels", host, f"built; {native.extension().usable[0]} instructions")
    if found["triton"] == "missing" and torch.cuda.is_available():
        yield Finding(
            WARNING, "triton", host, "missing", "kernels fall back to the slow references; pip install triton"
        )


def look_at_limits(host: str) -> Iterator[Finding]:
    """Open files, shared memory, main memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < 1024:
        yield Finding(WARNING, "open files", host, f"ulimit -n is {files}", "large jobs need 65536: ulimit -n 65536")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < 512 * 2**20:
        remedy = "NCCL talks through it: give the container more (--shm-size, --ipc=host)"
        yield Finding(WARNING, "/dev/shm", host, f"{free / 2**20:.0f} MiB free", remedy)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield Finding(
        OK, "machine", host, f"{counted(len(own_cores()), 'core')} for this process, {memory:.0f} GiB of memory"
    )


def look_at_cores(host: str, cores: int, gpus: int) -> list[Finding]:
    """A fault where the ranks of a node, one on each GPU, have too few cores between them."""
    if cores >= LEAST_CORES * gpus:
        return []
    remedy = f"give each rank {LEAST_CORES} or more: --cpus-per-task 8 in a SLURM job, more CPUs for the container"
    value = f"{counted(cores, 'core')} for {counted(gpus, 'GPU')}"
    return [Finding(FAULT, "cores", host, value, remedy)]


def look_at_disk(host: str, run_dir: Path, needed: int = 0) -> Iterator[Finding]:
    """Free space and write access in the run directory; `needed` bytes for its checkpoints."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    value, where = f"{free / 2**30:,.0f} GiB free at {folder}", f"{host}"
    if needed > free:
        remedy = (
            f"the run's checkpoints need {needed / 2**30:,.0f} GiB: free some, lower checkpoint.keep, or move run.dir"
        )
        yield Finding(FAULT, "disk", where, value, remedy)
    elif free < _LEAST_FREE:
        yield Finding(WARNING, "disk", where, value, "checkpoints may not fit: free some, or move run.dir")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".megalite-doctor-") as file:
            began = time.perf_counter()
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            rate = _PROBE_BYTES / (time.perf_counter() - began) / 1e6
        yield Finding(OK, "disk", where, f"{value}, writes {rate:,.0f} MB/s")
    except OSError as error:
        yield Finding(FAULT, "disk", where, f"{folder} cannot be written: {error.strerror}", "choose another run.dir")


def multiply(device: torch.device) -> tuple[float, bool]:
    """(TFLOP/s of a large matrix product, whether two runs of it gave the same bits): bf16 on GPUs, fp32 on CPUs."""
    gpu = device.type == "cuda"
    size, dtype = (_GPU_SIZE, torch.bfloat16) if gpu else (_CPU_SIZE, torch.float32)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    first = left @ right
    same = bool(torch.equal(first, left @ right))
    done, began = 0, time.perf_counter()
    best = 0.0
    while (now := time.perf_counter()) - began < _MEASURE_SECONDS or done < 3:
        left @ right
        if gpu:
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - now))
        done += 1
    return best / 1e12, same


def devices_here(use_gpus: bool = True) -> list[torch.device]:
    """This machine's GPUs, or its CPU if it has none."""
    count = torch.cuda.device_count() if use_gpus and torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def look_at_devices(host: str, devices: Sequence[torch.device]) -> tuple[list[Finding], dict[str, float]]:
    """Multiply on each device; findings, and TFLOP/s by device."""
    findings, rates = [], {}
    for device in devices:
        name = f"gpu {device.index}" if device.type == "cuda" else "cpu"
        where = f"{host} {name}"
        try:
            rates[name], same = multiply(device)
        except RuntimeError as error:
            remedy = "the GPU does not compute: reset it or drain the node"
            findings.append(Finding(FAULT, "matmul", where, str(error).splitlines()[0][:160], remedy))
            continue
        if not same:
            remedy = "silent data corruption: drain the node"
            findings.append(Finding(FAULT, "matmul", where, "two runs of one product differ", remedy))
        kind = "bf16" if device.type == "cuda" else f"fp32, {counted(torch.get_num_threads(), 'thread')}"
        findings.append(Finding(OK, "matmul", where, f"{rates[name]:,.3g} TFLOP/s ({kind})"))
    return findings, rates
