"""An all-gather of short JSON values among all ranks, on a process group of its own.

Saving runs in a thread while the main thread trains, and collectives of two threads must not share a group. The group
uses gloo whatever the training uses, since the values are in host memory.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from megalite.mesh import Mesh


class Peers:
    """All ranks of a mesh. Every rank must create it and call `exchange` in the same order, one call at a time."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size = mesh.rank, mesh.size
        self._group = mesh.background_group()

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order; raises RuntimeError if a peer is dead or hangs."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.empty(self.size, dtype=torch.int64)
        self._group.all_gather(lengths, torch.tensor([len(text)])).wait()
        width = int(lengths.max())
        padded, everything = torch.zeros(width, dtype=torch.uint8), torch.empty(self.size * width, dtype=torch.uint8)
        padded[: len(text)] = text
        self._group.all_gather(everything, padded).wait()
        rows = everything.view(self.size, width)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths.tolist())]

    def first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.exchange(value if self.rank == 0 else None)[0]
