"""What a decoder layer does in a training step, counted on the meta device without a GPU, and how counts are shown.

Whole steps of one and of two layers run as a GPU would be given them, with Triton's kernels where there are any; the
difference is the layer's own. `memory_passes.py` and `launches.py` count with it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # so that Triton's kernels may be chosen; none of them runs

import torch
from provenance import commit
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.config import build_config
from megalite.files import write_atomically
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer

META = torch.device("meta")
FREE = frozenset(
    ("view", "_unsafe_view", "t", "transpose", "detach", "slice", "split", "split_with_sizes", "alias", "expand",
     "permute", "unsqueeze", "squeeze", "select", "empty", "new_empty", "empty_like", "as_strided", "_reshape_alias",
     "narrow", "empty_strided", "lift_fresh", "unbind", "unflatten")
)  # fmt: skip
"""Operations that move nothing."""
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


def show(
    options: Options,
    what: str,
    layer: Callable[[int, str], dict[str, Any]],
    lines: Callable[[dict[str, Any]], Iterable[str]],
    fields: Mapping[str, str],
) -> None:
    """Count a layer for every setting of recomputation, print the counts, and write them.

    Args:
        what: of the title.
        layer: (tokens, recompute) -> its counts.
        lines: of its single counts.
        fields: those that are put beside an earlier version's, with their formats.
    """
    now = {recompute: layer(options.tokens, recompute) for recompute in options.recompute}
    before = json.loads(options.before.read_text())["now"] if options.before else {}
    for recompute, counts in now.items():
        print(f"recompute {recompute}: {what}one layer and micro-batch, {options.tokens} tokens, forward and backward")
        for line in lines(counts):
            print(f"  {line}")
        for field, form in fields.items():
            old = f"   before {before[recompute][field]}" if recompute in before else ""
            print(f"  {field:<48}{counts[field]:{form}}{old}")
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
