"""Bytes that FP8 moves outside its products, counted without a device.

    python benchmarks/fp8_traffic.py --label after --output benchmarks/results/fp8_traffic.json

Forward and backward of layers of Llama 3 8B's size, 8192 tokens in a micro-batch, run on the meta device with the
Triton kernels' fake forms. Every operator counts what it reads and writes, once; a cast of rows of more than 16384
numbers, which are read twice, counts so. A layer's bytes are half of the difference between four layers and two;
products are left out. `extra` is what a micro-batch takes beyond bf16. A file that exists keeps its rows of other
labels, so that one commit can be put beside another.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # no kernel runs; it lets them be chosen without a GPU

import torch
import triton
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.cli import program
from megalite.config import build_config
from megalite.data.batch import Batch
from megalite.files import write_atomically
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer

TOKENS = 8192
MODEL = {
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "heads": 32,
    "kv_heads": 8,
    "vocab_size": 128256,
    "max_positions": TOKENS,
}
PRODUCTS = ("mm", "addmm", "addmm_", "_scaled_mm", "fp8_block_product")
NOT_MOVED = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "lift_fresh")
HELD = 16384
META = torch.device("meta")


class Traffic(TorchDispatchMode):
    """Bytes by operator: all tensors that it takes and gives; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operator(*arguments, **(options or {}))
        name = str(operator).split(".")[1]
        views = any(out.alias_info and not out.alias_info.is_write for out in operator._schema.returns)
        if not views and name not in (*PRODUCTS, *NOT_MOVED):
            moved = [x for x in tree_leaves((arguments, options, result)) if isinstance(x, Tensor)]
            if name == "fp8_cast_rows" and arguments[0].shape[1] > HELD:
                moved.append(arguments[0])
            self.bytes[name] += sum(x.numel() * x.element_size() for x in moved)
        return result


def counted(layers: int, fp8: str, micro_batches: int) -> Counter[str]:
    """Of one accumulation of gradients."""
    train = {"seq_length": TOKENS, "micro_batch_size": 1, "global_batch_size": micro_batches, "precision": "bf16"}
    config = build_config({"model": {"layers": layers, **MODEL}, "train": {**train, "fp8": fp8}})
    kernels = select_kernels({"default": "triton", "attention": "triton"}, META)
    trainer = Trainer(config, Mesh(device=META), kernels)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=META)
    with Traffic() as traffic:
        trainer.accumulate([Batch(tokens, tokens)] * micro_batches)
    return traffic.bytes


def of_a_layer(fp8: str, micro_batches: int) -> dict[str, float]:
    """GB a layer and micro-batch, by operator."""
    two, four = (counted(layers, fp8, micro_batches) for layers in (2, 4))
    return {
        name: (four[name] - two[name]) / 2 / micro_batches / 1e9
        for name in sorted(four, key=lambda name: two[name] - four[name])
        if four[name] > two[name]
    }


@program
def main() -> None:
    tyro.cli(count)


def count(label: str, output: Path) -> None:
    """Count, print, and put the rows into the file.

    Args:
        label: What the rows are called.
        output: JSON file to write.
    """
    torch.Tensor.nonzero = lambda x: torch.zeros(x.numel(), 1, dtype=torch.int64, device=x.device)  # type: ignore
    rows: list[dict[str, Any]] = []
    for micro_batches in (1, 8):
        plain = of_a_layer("none", micro_batches)
        for fp8 in ("none", "tensor", "row", "block"):
            moved = plain if fp8 == "none" else of_a_layer(fp8, micro_batches)
            total = sum(moved.values())
            rows.append(
                {
                    "label": label,
                    "fp8": fp8,
                    "micro_batches": micro_batches,
                    "gb_a_layer": round(total, 3),
                    "extra_gb": round(total - sum(plain.values()), 3),
                    "by_operator": {name: round(size, 3) for name, size in moved.items() if size > 0.0005},
                }
            )
            print(f"{label}: {fp8:<7}{micro_batches} micro-batches {total:7.2f} GB, extra {rows[-1]['extra_gb']:6.2f}")
    others = json.loads(output.read_text())["rows"] if output.exists() else []
    document = {
        "what": "GB outside products, a layer of Llama 3 8B and a micro-batch of 8192 tokens, forward and backward",
        "command": "python benchmarks/fp8_traffic.py --label LABEL --output FILE",
        "machine": f"{platform.machine()}, meta device",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [row for row in others if row["label"] != label] + rows,
    }
    write_atomically(output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
