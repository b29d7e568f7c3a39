"""An all-gather of short JSON values among all ranks, on a process group of its own.

Saving runs in a thread while the main thread trains, and collectives of two threads must not share a group. The group
uses gloo whatever the training uses, since the values are in host memory.
"""

from __future__ import annotations

from typing import Any

from megalite.mesh import Mesh


class Peers:
    """All ranks of a mesh. Every rank must create it and call `exchange` in the same order, one call at a time."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size = mesh.rank, mesh.size
        self._group = mesh.background_group()

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order; raises RuntimeError if a peer is dead or hangs."""
        return self._group.gather_json(value)

    def first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.exchange(value if self.rank == 0 else None)[0]
