"""Where the processor seconds of a training step of `benchmarks/train.py` go, in one process on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/step_parts.py [--precision bf16] [--output FILE]

Every operation of the 10 M model runs alone at its size and as often as a step does; its processor seconds are the
median of a few calls. Products are timed as the step makes them, with fresh results, and beside them at the rate that
`benchmarks/train.py` compares with: forward products into results that are there already. Then come whole steps. What
an operation costs in a step, where its inputs are in a cache or not, may differ by some percent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from clock import cpu_seconds
from torch import Tensor
from train_job import PRESETS, Job, micro_batches
from train_worker import configuration, draw_weights

from megalite.cli import program
from megalite.data.batch import Batch
from megalite.files import write_atomically
from megalite.kernels import Kernels, select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import DTYPES
from megalite.train.trainer import Trainer

CALLS = 7
CPU = torch.device("cpu")


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds, the median of a few calls after one."""
    return cpu_seconds(call, CALLS)


def both_ways(call: Callable[..., Any], *inputs: Tensor) -> float:
    """Forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run() -> None:
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    return seconds(run)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total += a @ b


def product_parts(job: Job) -> dict[str, float]:
    """Products of all layers and of the output layer, in the step and at the rate of plain ones."""
    shape, dtype = job.shape, DTYPES[job.precision]
    hidden, ffn, layers = shape["hidden_size"], shape["ffn_hidden_size"], shape["layers"]
    projected = hidden * (shape["heads"] + 2 * shape["kv_heads"]) // shape["heads"]
    rows, chunk = job.tokens, 512
    sizes = [(hidden, projected, rows, layers), (hidden, hidden, rows, layers), (hidden, 2 * ffn, rows, layers)]
    sizes += [(ffn, hidden, rows, layers), (hidden, shape["vocab_size"], chunk, rows // chunk)]
    made = flop = 0.0
    for inner, outer, count, times in sizes:
        x, weight, grad = (torch.randn(size).to(dtype) for size in ((count, inner), (outer, inner), (count, outer)))
        total, turned = torch.zeros(outer, inner), grad.t()
        add = partial(total.addmm_, turned, x) if dtype == torch.float32 else partial(add_product, total, turned, x)
        calls = (partial(torch.matmul, x, weight.t()), partial(torch.matmul, grad, weight), add)
        made += times * sum(map(seconds, calls))
        flop += times * 6.0 * count * inner * outer
    plain = plain_flop = 0.0
    for inner, outer in ((hidden, 2 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)):
        a, b = (torch.randn(size).to(dtype) for size in ((rows, inner), (inner, outer)))
        out = torch.empty(rows, outer, dtype=dtype)
        plain += seconds(partial(torch.mm, a, b, out=out))
        plain_flop += 2.0 * rows * inner * outer
    return {"products": made, "the same at the plain rate": flop * plain / plain_flop}


def other_parts(job: Job, kernels: Kernels) -> dict[str, float]:
    """Everything between the products that takes more than a percent."""
    shape, dtype, length = job.shape, DTYPES[job.precision], job.preset.seq_length
    hidden, ffn, layers, batch = shape["hidden_size"], shape["ffn_hidden_size"], shape["layers"], job.micro

    def randn(*size: int) -> Tensor:
        return torch.randn(*size).to(dtype)

    width = hidden // shape["heads"]
    q, k, v = (randn(length, batch, shape[heads], width) for heads in ("heads", "kv_heads", "kv_heads"))
    cos, sin = (torch.randn(length, width) for _ in range(2))
    x, residual, weight = randn(length, batch, hidden), randn(length, batch, hidden), torch.ones(hidden, dtype=dtype)
    return {
        "attention": layers * both_ways(kernels.attention, q, k, v),
        "SwiGLU": layers * both_ways(kernels.swiglu, randn(length, batch, 2 * ffn)),
        "norms": layers * 2 * both_ways(lambda a, b, w: kernels.add_rms_norm(a, b, w, 1e-5), x, residual, weight),
        "rotation": layers * both_ways(lambda q, k: kernels.rope(q, k, cos, sin), q, k),
    }


def step_seconds(job: Job, kernels: Kernels) -> float:
    trainer = Trainer(configuration(job), Mesh(device=CPU), kernels)
    draw_weights(trainer)
    batches = [Batch(tokens, labels) for tokens, labels in micro_batches(job, 0)]
    trainer.step(batches, 1e-3)
    return seconds(lambda: trainer.step(batches, 1e-3))


@program
def main() -> None:
    tyro.cli(measure)


def measure(precision: Literal["fp32", "bf16"] = "fp32", output: Path | None = None) -> None:
    """Measure and print.

    Args:
        precision: Of weights and activations.
        output: JSON file to write.
    """
    torch.manual_seed(1)
    job = Job("megalite", "10m", PRESETS["10m"].model["layers"], precision)
    kernels = select_kernels({"default": "auto"}, CPU)
    parts = product_parts(job) | other_parts(job, kernels)
    parts["step"] = step_seconds(job, kernels)
    named = sum(value for name, value in parts.items() if name not in ("step", "the same at the plain rate"))
    parts["rest: loss, optimizer, sums, autograd"] = parts["step"] - named
    for name, value in parts.items():
        print(f"{name:<40}{value:7.3f} s {value / parts['step']:7.1%}")
    if output is not None:
        document = {
            "what": "processor seconds of a step's operations, each alone at its size",
            "command": f"python benchmarks/step_parts.py --precision {precision}",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "seconds": {name: round(value, 4) for name, value in parts.items()},
        }
        write_atomically(output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
