"""Weights that are held by several ranks, compared bit by bit: all copies must stay the same.

Data-parallel ranks hold the same weights (except under ZeRO-3), tensor-parallel ranks the same norms, the first and the
last stage a tied embedding. Their copies are computed or sent separately, so a bit that flips on one rank, a faulty
processor or a reduction that a layer forgot makes them differ, and nothing else would tell. Megatron-LM has
`--check-weight-hash-across-dp-replicas-interval` for the first of these.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.mesh import Group, Mesh
from megalite.model.sharded import ShardedModel
from megalite.parallel.buckets import Bucket, ShardedBucket
from megalite.placement import Box

Key = tuple[str, tuple[int, ...]]
"""Global name and offset of a box."""

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd constant that spreads row numbers over 64 bits (Knuth's multiplicative hashing), as a signed integer."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """A box whose copies differ: the digest on each rank that holds it."""

    name: str
    offset: tuple[int, ...]
    digests: dict[int, int]

    @property
    def key(self) -> Key:
        return self.name, self.offset

    @property
    def suspects(self) -> tuple[int, ...]:
        """The ranks that disagree with the majority; empty if there is none."""
        (digest, count), *_ = Counter(self.digests.values()).most_common()
        if 2 * count <= len(self.digests):
            return ()
        return tuple(sorted(rank for rank, other in self.digests.items() if other != digest))

    @property
    def sides(self) -> list[list[int]]:
        """The ranks that agree with each other."""
        sides: dict[int, list[int]] = {}
        for rank, value in sorted(self.digests.items()):
            sides.setdefault(value, []).append(rank)
        return list(sides.values())

    def __str__(self) -> str:
        shares = " against ".join(", ".join(map(str, ranks)) for ranks in self.sides)
        return f"{self.name} from {list(self.offset)} (ranks {shares})"


class Replicas:
    """The replicated boxes of some models. All ranks make the same calls."""

    def __init__(self, models: Sequence[ShardedModel], mesh: Mesh) -> None:
        self.models, self.mesh = models, mesh

    @torch.no_grad()
    def digests(self) -> dict[Key, int]:
        """The digest of every box on this rank that another rank may hold too."""
        for model in self.models:
            model.wait_for_all_gather()
        found = [(box, bucket, digest(box.view(slot))) for bucket, slot, box in self._boxes()]
        values = torch.stack([value for _, _, value in found]).tolist() if found else []
        return {(box.name, box.offset): value for (box, _, _), value in zip(found, values)}

    @torch.no_grad()
    def values(self, keys: Collection[Key]) -> dict[Key, Tensor]:
        """Copies of those of these boxes that this rank holds, fp64 in host memory."""
        return {
            (box.name, box.offset): box.view(slot).double().cpu()
            for _, slot, box in self._boxes()
            if (box.name, box.offset) in keys
        }

    def _boxes(self) -> Iterator[tuple[Bucket, Tensor, Box]]:
        for bucket in self._whole_buckets():
            for slot in bucket.slots:
                for box in slot.parameter.placement.boxes:
                    if bucket.group.size > 1 or len(box.replicas) > 1:
                        yield bucket, slot.of(bucket.parameters), box

    def _whole_buckets(self) -> Iterator[Bucket]:
        for model in self.models:
            for stage in model.buckets.values():
                for bucket in stage.buckets:
                    if not (isinstance(bucket, ShardedBucket) and bucket.reshards):
                        yield bucket

    def compare(self, own: dict[Key, int]) -> list[Difference]:
        """The boxes whose copies differ, by name; the same list on all ranks. `own` are this rank's `digests`.

        While all are equal, this takes one reduction along each group of data-parallel ranks, one gather along the
        tensor and pipeline groups of what is replicated there, and one number over all ranks.
        """
        suspicious = self._over_data(own) | self._within_model(own)
        count = torch.tensor([float(len(suspicious))], device=self.mesh.device)
        self.mesh.world.all_reduce(count, "max").wait()
        if not count.item():
            return []
        told = [[name, offset, own[name, offset]] for name, offset in sorted(suspicious)]
        holders: dict[Key, dict[int, int]] = {}
        for rank, lines in enumerate(self.mesh.world.gather_json(told, self.mesh.device)):
            for name, offset, value in lines:
                holders.setdefault((name, tuple(offset)), {})[rank] = value
        return [Difference(name, offset, values) for (name, offset), values in sorted(holders.items())]

    def _over_data(self, own: dict[Key, int]) -> set[Key]:
        """Keys that differ between ranks that train on different data."""
        groups: dict[tuple[int, ...], tuple[Group, list[Key]]] = {}
        for bucket, _, box in self._boxes():
            if bucket.group.size > 1:
                groups.setdefault(bucket.group.ranks, (bucket.group, []))[1].append((box.name, box.offset))
        found: set[Key] = set()
        for group, keys in groups.values():
            values = torch.tensor([own[key] for key in keys], device=self.mesh.device)
            bounds = torch.cat([values, ~values])  # the largest ~x is the complement of the smallest x
            group.all_reduce(bounds, "max").wait()
            largest, smallest = bounds[: len(keys)], ~bounds[len(keys) :]
            found.update(key for key, differs in zip(keys, (largest != smallest).tolist()) if differs)
        return found

    def _within_model(self, own: dict[Key, int]) -> set[Key]:
        """Keys that differ between replicas at the same data coordinate."""
        shared = {(box.name, box.offset): box.replicas for _, _, box in self._boxes() if len(box.replicas) > 1}
        found: set[Key] = set()
        for axis in ("tp", "pp"):
            group = self.mesh.group(axis)
            lines = [[name, offset, own[name, offset]] for name, offset in sorted(shared)]
            for theirs in group.gather_json(lines, self.mesh.device) if group.size > 1 else ():
                for name, offset, value in theirs:
                    key = (name, tuple(offset))
                    if key in shared and value != own[key]:
                        found.add(key)
        return found


def digest(tensor: Tensor) -> Tensor:
    """int64 scalar from the bits of a tensor: the rows' words are summed, and the sums weighted by the row's number.

    One flipped bit always changes it. It depends on the values and their places alone, not on where they are stored.
    """
    rows = tensor.reshape(tensor.shape[0], -1).contiguous()
    size = rows.element_size()
    if rows.shape[1] * size % 8 == 0:
        aligned = rows if rows.storage_offset() * size % 8 == 0 else rows.clone()
        sums = aligned.view(torch.int64).sum(1)
    else:
        sums = rows.view(_WORDS[size]).sum(1, dtype=torch.int64)
    weights = torch.arange(1, len(sums) + 1, device=tensor.device) * _MULTIPLIER | 1
    return (sums * weights).sum()


def hosts(mesh: Mesh) -> list[str]:
    """The host of every rank."""
    return [str(host) for host in mesh.world.gather_json(socket.gethostname(), mesh.device)]
