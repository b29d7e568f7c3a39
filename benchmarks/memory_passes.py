"""Bytes that a decoder layer moves outside its matrix products, counted on the meta device without a GPU.

    python benchmarks/memory_passes.py                      # Llama 3 8B's layer, 8192 tokens, bf16
    python benchmarks/memory_passes.py --before OLD.json --output benchmarks/results/memory_passes.json

Whole training steps of one and of two layers run as a GPU would be given them (Triton's kernels where there are any),
forward and backward; the difference is the layer's own. Every operation reads its tensor arguments once and writes its
results once; an argument that is changed in place is read and written. Views and empty tensors move nothing, and an
expanded tensor counts whole. Products (`PRODUCTS`) are listed, but left out of the sum; attention's own kernels are in
it. `--before` puts the counts of an earlier version, as this script wrote them there, beside the new ones. What is kept
was made in the forward pass of a stage and is still held at its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # so that Triton's kernels may be chosen; none of them runs

import torch
import tyro
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.cli import program
from megalite.config import build_config
from megalite.data.batch import Batch
from megalite.files import write_atomically
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer

META = torch.device("meta")
PRODUCTS = frozenset(("mm", "addmm", "addmm_", "bmm", "_scaled_mm", "linear"))
OVERWRITES = frozenset(("copy_", "zero_", "fill_"))
FREE = frozenset(
    ("view", "_unsafe_view", "t", "transpose", "detach", "slice", "split", "split_with_sizes", "alias", "expand",
     "permute", "unsqueeze", "squeeze", "select", "empty", "new_empty", "empty_like", "as_strided", "_reshape_alias",
     "narrow", "empty_strided", "lift_fresh", "unbind", "unflatten")
)  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "ffn_hidden_size": 14336, "heads": 32, "kv_heads": 8, "vocab_size": 128256}
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Options:
    """Counts of one layer and micro-batch."""

    tokens: int = 8192
    """Tokens of the micro-batch, of one sequence."""
    recompute: tuple[str, ...] = ("none", "selective")
    """Settings of train.recompute."""
    before: Path | None = None
    """Counts of an earlier version to put beside these."""
    output: Path | None = None
    """JSON file for the counts; without it they are only printed."""


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


class Passes(TorchDispatchMode):
    """Calls and bytes by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[-1]
        if name not in FREE:
            given = list(tensors((args, kwargs or {})))
            moved = sum(map(size, given)) + sum(map(size, tensors(result)))
            if kwargs and "out" in kwargs:  # an argument and the result; it is written alone
                moved -= size(kwargs["out"])
            elif name in OVERWRITES:
                moved -= size(given[0])
            self.calls[name] += 1
            self.bytes[name] += moved
        return result


class Living(TorchDispatchMode):
    """The storages made while it is on, without holding them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tensors(result)):
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        """Of those that are still held."""
        return sum(count for storage, count in self.storages.values() if not storage.expired())


def trainer_of(layers: int, tokens: int, recompute: str) -> Trainer:
    """A trainer of `layers` layers on the meta device."""
    config = build_config(
        {
            "model": LLAMA_8B | {"layers": layers, "max_positions": tokens},
            "train": {
                "seq_length": tokens,
                "micro_batch_size": 1,
                "global_batch_size": MICRO_BATCHES,
                "precision": "bf16",
                "recompute": recompute,
            },
        }
    )
    kernels = select_kernels({"default": "triton"}, META)
    return Trainer(config, Mesh(rank=0, device=META), kernels)


@contextmanager
def on_a_hopper() -> Iterator[None]:
    """What asks torch for the GPU is told of one of compute capability 9.0."""
    with (
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        yield


def commit() -> str:
    """The commit that is counted."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def count(layers: int, tokens: int, recompute: str) -> tuple[Passes, int]:
    """What a step of `layers` layers moves, and the bytes that one micro-batch keeps."""
    trainer = trainer_of(layers, tokens, recompute)
    tokens_BS = torch.zeros(1, tokens, dtype=torch.int64, device=META)
    batch = Batch(tokens_BS, tokens_BS)
    passes = Passes()
    with on_a_hopper():
        with passes:
            trainer.accumulate([batch] * MICRO_BATCHES)
        living, stage = Living(), trainer.stages[0]
        with living:
            hidden = stage(tokens_BS, stage.positions(tokens))
        kept = living.bytes()
        del hidden
    return passes, kept


def layer(tokens: int, recompute: str) -> dict[str, Any]:
    """One layer and micro-batch: two layers less one."""
    (few, kept_few), (many, kept_many) = (count(layers, tokens, recompute) for layers in (1, 2))
    rows = {
        name: {
            "calls": (many.calls[name] - few.calls[name]) / MICRO_BATCHES,
            "gb": round((many.bytes[name] - few.bytes[name]) / MICRO_BATCHES / 1e9, 3),
        }
        for name in sorted(many.bytes, key=lambda name: few.bytes[name] - many.bytes[name])
        if many.calls[name] > few.calls[name]
    }
    passes = {name: row for name, row in rows.items() if name not in PRODUCTS}
    return {
        "gb_outside_products": round(sum(row["gb"] for row in passes.values()), 2),
        "calls_outside_products": sum(row["calls"] for row in passes.values()),
        "gb_of_products": round(sum(row["gb"] for name, row in rows.items() if name in PRODUCTS), 2),
        "gb_kept": round((kept_many - kept_few) / 1e9, 3),
        "operations": rows,
    }


@program
def main() -> None:
    """Count, print and write."""
    options = tyro.cli(Options, description=__doc__)
    now = {recompute: layer(options.tokens, recompute) for recompute in options.recompute}
    before = json.loads(options.before.read_text())["now"] if options.before else {}
    for recompute, counts in now.items():
        print(f"recompute {recompute}: GB of one layer and micro-batch, {options.tokens} tokens, forward and backward")
        for name, row in counts["operations"].items():
            print(f"  {name:<36}{row['calls']:6.2f} calls {row['gb']:8.3f}")
        for field in ("gb_outside_products", "calls_outside_products", "gb_of_products", "gb_kept"):
            old = f"   before {before[recompute][field]}" if recompute in before else ""
            print(f"  {field:<36}{counts[field]:8.2f}{old}")
    if options.output:
        document = {
            "model": LLAMA_8B,
            "tokens": options.tokens,
            "torch": torch.__version__,
            "commit": commit(),
            "now": now,
            **({"before": before} if before else {}),
        }
        write_atomically(options.output, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
