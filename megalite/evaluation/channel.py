"""How rank 0 tells the other ranks what to do, and gets their answers: on a process group of its own.

The group uses gloo whatever the model uses: what travels is in host memory, and ranks that wait for rank 0 to read
data or to run programs do not keep a GPU busy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megalite.mesh import Mesh

Message = Mapping[str, Any]


class Channel:
    """All ranks of a mesh; every rank must create it and call its methods in the same order."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size = mesh.rank, mesh.size
        self._group = mesh.background_group() if mesh.size > 1 else None

    def send(self, message: Message, ids: np.ndarray) -> None:
        """Rank 0: give all others a JSON message and an int32 array [n]."""
        if self._group is None:
            return
        text = json.dumps(message).encode()
        content = np.frombuffer(text + ids.astype(np.int32).tobytes(), np.uint8).copy()
        self._group.broadcast(torch.tensor([len(text), len(content)]), 0).wait()
        self._group.broadcast(torch.from_numpy(content), 0).wait()

    def receive(self) -> tuple[dict[str, Any], np.ndarray]:
        """The other ranks: what rank 0 sent; waits for it."""
        assert self._group is not None
        sizes = torch.zeros(2, dtype=torch.int64)
        self._group.broadcast(sizes, 0).wait()
        text_bytes, size = sizes.tolist()
        content = torch.empty(size, dtype=torch.uint8)
        self._group.broadcast(content, 0).wait()
        whole = content.numpy()
        return json.loads(whole[:text_bytes].tobytes()), np.frombuffer(whole[text_bytes:].tobytes(), np.int32)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of every rank's float64 array of the same shape, on all ranks."""
        if self._group is not None:
            total = torch.from_numpy(values)
            self._group.all_reduce(total).wait()
        return values

    def gather(self, ids: np.ndarray) -> list[np.ndarray]:
        """Every rank's int64 array [n], in rank order, on all ranks; n may differ."""
        if self._group is None:
            return [ids]
        sizes = torch.empty(self.size, dtype=torch.int64)
        self._group.all_gather(sizes, torch.tensor([len(ids)])).wait()
        width = max(1, int(sizes.max()))
        own, everything = torch.zeros(width, dtype=torch.int64), torch.empty(self.size * width, dtype=torch.int64)
        own[: len(ids)] = torch.from_numpy(ids)
        self._group.all_gather(everything, own).wait()
        return [row[:size].numpy() for row, size in zip(everything.view(self.size, width), sizes.tolist())]
