"""A case of `benchmarks/kernels.py`, and where and at what size it is measured; the cases are in `kernel_cases.py`."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalite.kernels import Kernels

Call = Callable[..., Any]


@dataclass
class Case:
    """One operation in one direction: what it must move or multiply, and who does it, ours first."""

    name: str
    bytes: float
    flop: float
    implementations: dict[str, Callable[[], Any]]
    prepare: Callable[[], Any] | None = None
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    width: int
    vocab: int
    lengths: tuple[int, ...]
    attention_tokens: int


LLAMA_8B = Sizes(8192, 4096, 14336, 32, 8, 128, 128256, (1024, 2048, 4096, 8192), 16384)
SMALL = Sizes(1024, 256, 688, 8, 4, 32, 8192, (512,), 1024)


@dataclass(frozen=True)
class Setting:
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    with_compile: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def name(self, operation: str) -> str:
        return f"megalite {self.kernels.choices[operation].split()[0]}"

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def compiled(self, call: Call) -> dict[str, Call]:
        return {"torch.compile": torch.compile(call, dynamic=False)} if self.with_compile else {}


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def liger(at: Setting) -> Any:
    return optional("liger_kernel.transformers.functional") if at.gpu else None


def missing(at: Setting, *modules: tuple[str, Any]) -> list[str]:
    gone = [name for name, module in modules if module is None and at.gpu]
    return gone if at.with_compile else [*gone, "torch.compile"]


def working(calls: dict[str, Callable[[], Any]], absent: list[str]) -> dict[str, Callable[[], Any]]:
    """Without the peers that fail at their first call; `absent` is told why. Ours has to work."""
    kept = {}
    for number, (who, call) in enumerate(calls.items()):
        try:
            call()
            kept[who] = call
        except Exception as error:
            if number == 0:
                raise
            absent.append(f"{who} ({type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:120]})")
    return kept


def both_ways(forward: Call, inputs: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward without a graph, and the backward alone, over one graph that is kept."""
    kept: list[Any] = []

    def run_forward() -> Any:
        with torch.no_grad():
            return forward(*inputs)

    def run_backward() -> Any:
        if not kept:
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = forward(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            kept.extend((outputs, leaves, [torch.randn_like(x) for x in outputs]))
        outputs, leaves, gradients = kept
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return run_forward, run_backward


def directions(
    name: str, contenders: dict[str, tuple[Call, list[Tensor]]], cost: str, amounts: tuple[float, float],
    absent: list[str],
) -> Iterator[Case]:  # fmt: skip
    """Forward and backward of one operation; cost: what `amounts` are, "bytes" or "flop"."""
    pairs = {who: both_ways(call, inputs) for who, (call, inputs) in contenders.items()}
    for index, direction in enumerate(("forward", "backward")):
        gone = list(absent)
        calls = working({who: pair[index] for who, pair in pairs.items()}, gone)
        moved, flop = (amounts[index], 0.0) if cost == "bytes" else (0.0, amounts[index])
        yield Case(f"{name} {direction}", moved, flop, calls, None, gone)
