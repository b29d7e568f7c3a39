"""Which heads a rank holds where several share the heads of an attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSplit:
    """Which heads one tensor rank holds; `kv_of_query` maps its query heads to its key/value heads, both local."""

    first_query: int
    queries: int
    first_kv: int
    kvs: int
    kv_of_query: tuple[int, ...]

    @property
    def grouped(self) -> bool:
        """Whether local query head h reads local kv head h // (queries / kvs), as attention kernels expect."""
        return self.queries % self.kvs == 0 and all(
            kv == head // (self.queries // self.kvs) for head, kv in enumerate(self.kv_of_query)
        )


def split_heads(heads: int, kv_heads: int, parts: int, index: int) -> HeadSplit:
    """The heads of part `index` of `parts`; `parts` divides `heads`, `kv_heads` divides `heads`."""
    queries, group = heads // parts, heads // kv_heads
    first = index * queries
    kvs = [head // group for head in range(first, first + queries)]
    return HeadSplit(first, queries, kvs[0], kvs[-1] - kvs[0] + 1, tuple(kv - kvs[0] for kv in kvs))
