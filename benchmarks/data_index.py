"""Index building and reading of batches: how fast, and against Megatron-LM's helpers where a copy of them is given.

    python benchmarks/data_index.py [--megatron MEGATRON_LM_CHECKOUT] [--millions 20]

Rates are per second of CPU time of one core, the best of three; Megatron-LM's `helpers.cpp` is compiled as its
Makefile does, outside the checkout, and runs on the same arrays in the same process. Every result is compared before it
is timed.
The shuffles are numpy's own on both sides and not part of the rates of building; they are shown beside them.
"""

import importlib.util
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11
import tyro

from megalite.config.sources import Source
from megalite.data import _index
from megalite.data.batches import Batches
from megalite.data.dataset import SampleOrder
from megalite.data.indexed import IndexedWriter

UNLIMITED = np.iinfo(np.int64).max
# tokens a second: a model of 125M parameters (6 FLOP a parameter and token) at half of an H200's 989 dense bf16 TFLOP/s
FASTEST_EIGHT_GPUS = 8 * 0.5 * 989e12 / (6 * 125e6)


@dataclass(frozen=True)
class Options:
    """Index building and reading of batches."""

    megatron: Path | None = None
    """A checkout of Megatron-LM to compare with."""
    millions: float = 20.0
    """Documents of the largest case, in millions."""


def cpu_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def compile_helpers(checkout: Path, folder: Path) -> ModuleType:
    source = checkout / "megatron" / "core" / "datasets" / "helpers.cpp"
    target = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = ["-O3", "-Wall", "-shared", "-std=c++17", "-fPIC"]
    subprocess.run(["c++", *flags, *includes, str(source), "-o", str(target)], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("helpers_cpp", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample_index(documents: int, mean_length: int, seq_length: int, helpers: ModuleType | None) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * mean_length, documents).astype(np.int32)
    order = np.arange(documents, dtype=np.int32)
    random = np.random.RandomState(0)
    shuffle = cpu_seconds(lambda: random.shuffle(order), 1)
    tokens = int(lengths.sum(dtype=np.int64))
    samples = (tokens - 1) // seq_length
    rows = np.empty((samples + 1, 2), np.int32)

    def ours() -> None:
        _index.build_sample_index(lengths.view(np.uint8), order, seq_length, rows)

    ours()
    line = f"{documents / 1e6:5.1f}M documents -> {samples / 1e6:6.2f}M samples of {seq_length:5d}:"
    if helpers is not None:

        def theirs() -> np.ndarray:
            return helpers.build_sample_idx_int32(lengths, order, seq_length, 1, tokens, True, 1)

        assert np.array_equal(rows, theirs())
    seconds = cpu_seconds(ours)
    line += f" {max(documents, samples) / seconds / 1e6:6.0f}M a second"
    if helpers is not None:
        line += f", {cpu_seconds(theirs) / seconds:4.1f} x Megatron-LM"
    print(f"{line}  (numpy's shuffle of the documents alone: {documents / shuffle / 1e6:.0f}M a second)")


def blend(datasets: int, samples: int, helpers: ModuleType | None) -> None:
    weights = np.random.default_rng(datasets).random(datasets)
    weights /= weights.sum()
    chosen, taken = np.empty(samples, np.int16), np.empty(samples, np.int64)
    limits = np.full(datasets, UNLIMITED)

    def ours() -> None:
        _index.build_blend(weights, limits, np.zeros(datasets, np.int64), 0, chosen, taken)

    line = f"blend of {datasets:3d} files:"
    ours()
    if helpers is not None:
        expected, expected_taken = np.empty_like(chosen), np.empty_like(taken)

        def theirs() -> None:
            helpers.build_blending_indices(expected, expected_taken, weights, datasets, samples, False)

        theirs()
        assert np.array_equal(chosen, expected) and np.array_equal(taken, expected_taken)
    seconds = cpu_seconds(ours)
    line += f" {samples / seconds / 1e6:6.0f}M samples a second"
    if helpers is not None:
        line += f", {cpu_seconds(theirs) / seconds:4.2f} x Megatron-LM"
    print(line)


def batches(folder: Path, mean_length: int, seq_length: int, document_mask: bool) -> None:
    prefix, rng = folder / f"tokens{mean_length}", np.random.default_rng(1)
    if not prefix.with_suffix(".idx").exists():
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(8):
                lengths = rng.integers(1, 2 * mean_length, 4_000_000 // mean_length)
                writer.add_documents(rng.integers(0, 50_000, lengths.sum()).astype(np.uint16), lengths)
    steps, size = 20, 256 * 4096 // seq_length
    dataset = SampleOrder(seq_length, 1, 50_000).dataset([Source(str(prefix))], steps * size)
    with Batches(dataset, micro_batch_size=8, document_mask=document_mask, ahead=0) as reader:
        reader.next_batch(0, size)
        seconds = cpu_seconds(lambda: [reader.next_batch(step * size, size) for step in range(steps)])
    rate = steps * size * seq_length / seconds
    print(
        f"batches, sequences of {seq_length:5d}, documents of about {mean_length:5d}"
        f"{', document masks' if document_mask else '':16}: {rate / 1e6:6.0f}M tokens a second on one core,"
        f" {rate / FASTEST_EIGHT_GPUS:5.1f} x what 8 GPUs take"
    )


def main() -> None:
    options = tyro.cli(Options)
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as name:
        helpers = compile_helpers(options.megatron, Path(name)) if options.megatron else None
        million = int(options.millions * 1e6)
        sample_index(million, 60, 4096, helpers)
        sample_index(million // 4, 1000, 4096, helpers)
        sample_index(million // 4, 1000, 128, helpers)
        for datasets in (2, 4, 8, 16, 32, 64):
            blend(datasets, 4_000_000, helpers)
        for mean_length, document_mask in ((1000, False), (60, False), (1000, True), (60, True)):
            batches(Path(name), mean_length, 4096, document_mask)


if __name__ == "__main__":
    main()
