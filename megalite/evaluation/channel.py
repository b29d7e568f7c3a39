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

from megalite.checkpoint.peers import Peers

Message = Mapping[str, Any]


class Channel(Peers):
    """`Peers`, with messages of rank 0 that hold arrays; the methods are called in the same order on every rank."""

    def send(self, message: Message, ids: np.ndarray) -> None:
        """Rank 0: give all others a JSON message and an int32 array [n]."""
        if self.size == 1:
            return
        text = json.dumps(message).encode()
        content = np.frombuffer(text + ids.astype(np.int32).tobytes(), np.uint8).copy()
        self._group.broadcast(torch.tensor([len(text), len(content)]), 0).wait()
        self._group.broadcast(torch.from_numpy(content), 0).wait()

    def receive(self) -> tuple[dict[str, Any], np.ndarray]:
        """The other ranks: what rank 0 sent; waits for it."""
        sizes = torch.zeros(2, dtype=torch.int64)
        self._group.broadcast(sizes, 0).wait()
        text_bytes, size = sizes.tolist()
        content = torch.empty(size, dtype=torch.uint8)
        self._group.broadcast(content, 0).wait()
        whole = content.numpy()
        return json.loads(whole[:text_bytes].tobytes()), np.frombuffer(whole[text_bytes:].tobytes(), np.int32)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of every rank's float64 array of the same shape, on all ranks."""
        if self.size > 1:
            total = torch.from_numpy(values)
            self._group.all_reduce(total).wait()
        return values
