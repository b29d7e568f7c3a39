"""Kernels that a decoder layer launches, and nodes of its autograd graph, counted on the meta device without a GPU.

    python benchmarks/launches.py                           # Llama 3 8B's layer, 8192 tokens, bf16
    python benchmarks/launches.py --before OLD.json --output benchmarks/results/launches.json

Both are what the host does for a layer, whatever its width: it matters where a layer is short, in small models and
under tensor parallelism. As in `memory_passes.py`, the layer's share is the difference between training steps of two
layers and of one, given what a GPU would be given. A custom operator counts as the launches of its own body, run on
tensors without values with Triton's launches counted and left out; an operation of torch's that moves or computes
something counts as one launch. The optimizer is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import tyro
from one_layer import FREE, META, MICRO_BATCHES, Options, on_a_hopper, show, tensors, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.cli import program
from megalite.data.batch import Batch


class Launches(TorchDispatchMode):
    """Launches by kernel: Triton's by the kernel's name, torch's by the operation's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, name = function._schema.name.split("::")
        if namespace == "megalite":
            with self:
                return torch._library.custom_ops.OPDEFS[f"megalite::{name}"]._init_fn(*args, **(kwargs or {}))
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # what it is made of
                return function.decompose(*args, **(kwargs or {}))
        if name not in FREE and any(x.numel() for x in tensors((args, kwargs or {}))):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))

    @contextmanager
    def of_triton(self) -> Iterator[None]:
        """Triton's launches are counted here, and do nothing."""

        def launch(kernel: Any, *args: Any, **options: Any) -> None:
            self.calls[kernel.__name__] += 1

        with mock.patch("triton.runtime.interpreter.InterpretedFunction.run", launch):
            yield


def count(layers: int, tokens: int, recompute: str) -> tuple[Counter[str], Counter[str]]:
    """(launches by kernel, nodes of the graph by kind) of a step of `layers` layers."""
    trainer = trainer_of(layers, tokens, recompute)
    tokens_BS = torch.zeros(1, tokens, dtype=torch.int64, device=META)
    launches = Launches()
    with on_a_hopper():
        with launches, launches.of_triton():
            trainer.accumulate([Batch(tokens_BS, tokens_BS)] * MICRO_BATCHES)
        stage = trainer.stages[0]
        hidden = stage(tokens_BS, stage.positions(tokens))
    nodes: Counter[str] = Counter()
    seen, found = set(), [hidden.grad_fn]
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes[type(node).__name__] += 1
            found += [next_node for next_node, _ in node.next_functions]
    return launches.calls, nodes


def layer(tokens: int, recompute: str) -> dict[str, Any]:
    """One layer and micro-batch: two layers less one."""
    (few, few_nodes), (many, many_nodes) = (count(layers, tokens, recompute) for layers in (1, 2))
    kernels = {name: (many[name] - few[name]) / MICRO_BATCHES for name in sorted(many) if many[name] > few[name]}
    nodes = {name: many_nodes[name] - few_nodes[name] for name in sorted(many_nodes)}
    return {
        "launches": sum(kernels.values()),
        "autograd_nodes": sum(nodes.values()),
        "kernels": kernels,
        "nodes": {name: number for name, number in nodes.items() if number},
    }


def lines(counts: dict[str, Any]) -> Iterator[str]:
    for kind in ("kernels", "nodes"):
        for name, number in counts[kind].items():
            yield f"{name:<48}{number:6.1f}"


@program
def main() -> None:
    """Count, print and write."""
    show(
        tyro.cli(Options, description=__doc__), "", layer, lines, dict.fromkeys(("launches", "autograd_nodes"), "6.1f")
    )


if __name__ == "__main__":
    main()
