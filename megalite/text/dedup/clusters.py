"""Clusters of similar documents (union-find over verified pairs) and which document of each is kept.

D: documents dropped
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np

from megalite.text.dedup.store import Store

Keep = Literal["first", "longest"]


class UnionFind:
    """Disjoint sets of 0 .. size - 1; the smallest member represents its set."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def find(self, item: int) -> int:
        parents = self._parents
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.find(first), self.find(second)))
        self._parents[high] = low

    def labels(self) -> np.ndarray:
        """The smallest member of each item's set, int64 [size]."""
        return np.array([self.find(item) for item in range(len(self._parents))], np.int64)


def drop_near_copies(pairs: Iterable[np.ndarray], keep: Keep, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Join similar pairs into clusters and drop all documents of a cluster but one.

    Kept is the first document in the order of the input, or with `longest` the one with the most distinct shingles
    (the first of these where several have as many).

    Returns:
        int64 [2, D], numbers of the dropped documents, rising, and of those kept for them; sizes of the clusters.
    """
    joined = np.concatenate([np.empty((0, 2), np.int64), *pairs])
    members, dense = np.unique(joined, return_inverse=True)
    sets = UnionFind(members.size)
    for first, second in dense.reshape(-1, 2).tolist():
        sets.join(first, second)
    labels = sets.labels()
    rank = np.zeros(members.size, np.int64)
    if keep == "longest":
        rank = np.array([-store.shingles(document).size for document in members.tolist()], np.int64)
    order = np.lexsort((members, rank, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sizes = np.diff(np.append(starts, members.size))
    kept = np.empty(members.size, np.int64)
    kept[order] = np.repeat(members[order[starts]], sizes)
    dropped = members != kept
    return np.stack([members[dropped], kept[dropped]]), sizes
