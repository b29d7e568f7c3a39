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

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import tyro
from one_layer import FREE, META, MICRO_BATCHES, Options, on_a_hopper, show, tensors, trainer_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.cli import program
from megalite.data.batch import Batch

PRODUCTS = frozenset(("mm", "addmm", "addmm_", "bmm", "_scaled_mm", "linear"))
OVERWRITES = frozenset(("copy_", "zero_", "fill_"))


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


def lines(counts: dict[str, Any]) -> Iterator[str]:
    for name, row in counts["operations"].items():
        yield f"{name:<36}{row['calls']:6.2f} calls {row['gb']:8.3f}"


@program
def main() -> None:
    """Count, print and write."""
    options = tyro.cli(Options, description=__doc__)
    fields = ("gb_outside_products", "calls_outside_products", "gb_of_products", "gb_kept")
    show(options, "GB of ", layer, lines, dict.fromkeys(fields, "8.2f"))


if __name__ == "__main__":
    main()
