"""A kind of attention call: what its speed depends on, and an example of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import next_power_of_two
from .reference import Documents, Options


@dataclass(frozen=True)
class Call:
    """What the speed of a call depends on. `gradients`: its backward is needed too.

    Without gradients lengths and batch count as the next power of two: generation must not measure anew for every
    token, nor whenever a row has ended.
    """

    queries: int
    keys: int
    batch: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    gradients: bool
    causal: bool = True
    window: int | None = None
    documents: bool = False
    softcap: float | None = None
    return_lse: bool = False

    def __post_init__(self) -> None:
        if not self.gradients:
            for name in ("queries", "keys", "batch"):
                object.__setattr__(self, name, next_power_of_two(getattr(self, name)))

    @staticmethod
    def of(tensors: tuple[Tensor, ...], options: Mapping[str, Any]) -> Call:
        (queries, batch, heads, width), (keys, _, kv_heads, _) = tensors[0].shape, tensors[1].shape
        asked, gradients = Options(**options), torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        sizes = (queries, keys, batch, heads, kv_heads, width, tensors[0].dtype, gradients)
        documents = asked.documents is not None
        return Call(*sizes, asked.causal, asked.window, documents, asked.softcap, asked.return_lse)

    def name(self, device: torch.device) -> str:
        """For the log and the run's state: the kind of call and the kind of device."""
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        options = {"causal": self.causal, "documents": self.documents, "log-sum-exp": self.return_lse}
        words = [name for name, wanted in options.items() if wanted]
        words += [f"{name} {x}" for name, x in (("window", self.window), ("softcap", self.softcap)) if x is not None]
        sizes = f"q {self.queries}x{self.batch}x{self.heads}x{self.width}, k {self.keys}x{self.kv_heads}"
        passes = "forward and backward" if self.gradients else "forward"
        return ", ".join([f"{sizes} {str(self.dtype).removeprefix('torch.')}", *words, f"{passes} on {where}"])

    def example(self, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Tensors and options of such a call, as a layer makes them: v is a view of the fused projection."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shape, length = (self.batch, sum(heads), self.width), max(self.queries, self.keys)
        q, k, v = torch.randn(length, *shape, device=device).to(self.dtype).split(heads, dim=2)
        tensors = (q[: self.queries].contiguous(), k[: self.keys].contiguous(), v[: self.keys])
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        if self.documents:
            numbers = torch.arange(self.keys, device=device) * 4 // self.keys
            options["documents"] = Documents(numbers[:, None].expand(-1, self.batch))
        if self.return_lse:
            options["return_lse"] = True
        return tuple(x.detach().requires_grad_(self.gradients) for x in tensors), options
