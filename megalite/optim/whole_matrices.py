"""Whole matrices for optimizers that look at a matrix as one (Muon), from pieces that lie on many ranks.

Tensor parallelism leaves each rank boxes of a global matrix, ZeRO leaves each data-parallel rank a range of those.
Every matrix has one worker among the ranks that hold any of it, so none is computed twice. In rounds that bound the
memory, all ranks send their pieces to the workers, the workers compute, and every holder gets back what it holds of the
results: two exchanges a round, the first of which runs while the round before is computed. Elements that several ranks
hold (ZeRO-0, shared key/value heads) are sent by one of them and come back to all.

T tensor ranks, D data-parallel ranks; rank d * T + t of their group is the one at (d, t).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.mesh import Mesh, Work
from megalite.optim.shard import Segment
from megalite.placement import Box, flat_ranges

ROUND_ELEMENTS = 1 << 24
"""What a worker holds of matrices in a round; a larger matrix has a round of its own."""

Span = tuple[int, int]
"""Elements [start, stop)."""


@dataclass(frozen=True)
class _Share:
    """A box of a matrix in a bucket of one tensor rank, with what is needed to find it on each of the D data ranks.

    `ranges` are its elements in the bucket, row-major. `owned`: this tensor rank is the one that sends them.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    ranges: tuple[Span, ...]
    segment: int
    length: int
    sharded: bool
    owned: bool

    @staticmethod
    def of_json(fields: Sequence[object]) -> _Share:
        name, shape, offset, size, ranges, *rest = fields
        spans = tuple(map(tuple, ranges))  # type: ignore[call-overload]
        return _Share(name, tuple(shape), tuple(offset), tuple(size), spans, *rest)  # type: ignore[arg-type]

    def json(self) -> list[object]:
        where = [self.name, self.shape, self.offset, self.size, self.ranges]
        return [*where, self.segment, self.length, self.sharded, self.owned]

    def place(self, matrix: Tensor) -> Tensor:
        """The box as a view of the whole matrix."""
        for dim, (start, length) in enumerate(zip(self.offset, self.size)):
            matrix = matrix.narrow(dim, start, length)
        return matrix

    def span(self, data: int, ranks: int, *, sent: bool) -> Span:
        """The range of the bucket that data rank `data` of `ranks` sends, or that it holds."""
        if not sent and not self.sharded:
            return 0, self.length
        return data * self.length // ranks, (data + 1) * self.length // ranks

    def pieces(self, data: int, ranks: int, *, sent: bool) -> Iterator[tuple[Span, Span]]:
        """What that data rank sends or holds: (elements of its segment, elements of the flattened box)."""
        if sent and not self.owned:
            return
        low, high = self.span(data, ranks, sent=sent)
        origin, _ = self.span(data, ranks, sent=False)
        position = 0
        for start, stop in self.ranges:
            first, last = max(start, low), min(stop, high)
            if first < last:
                yield (first - origin, last - origin), (position + first - start, position + last - start)
            position += stop - start


@dataclass(frozen=True)
class _Assembly:
    """One matrix in the hands of its worker: for each of its boxes, which elements of the arriving and of the leaving
    buffer are which elements of the flattened box."""

    shape: tuple[int, ...]
    boxes: tuple[tuple[_Share, tuple[tuple[Span, Span], ...], tuple[tuple[Span, Span], ...]], ...]

    def gather(self, buffer: Tensor) -> Tensor:
        """The matrix, from the arriving buffer."""
        matrix = torch.empty(self.shape, dtype=buffer.dtype, device=buffer.device)
        for share, arriving, _ in self.boxes:
            place = share.place(matrix)
            flat = matrix.view(-1) if share.size == self.shape else buffer.new_empty(place.numel())
            for (start, stop), (first, last) in arriving:
                flat[first:last].copy_(buffer[start:stop])
            if arriving and share.size != self.shape:
                place.copy_(flat.view(share.size))
        return matrix

    def scatter(self, matrix: Tensor, buffer: Tensor) -> None:
        """Write the matrix into the leaving buffer."""
        for share, _, leaving in self.boxes:
            flat = share.place(matrix).reshape(-1)
            for (first, last), (start, stop) in leaving:
                buffer[first:last].copy_(flat[start:stop])


@dataclass(frozen=True)
class _Round:
    """What this rank sends (`out`, pieces of its segments), works on, and gets back (`back`); with the number of
    elements to and from each rank of the group, on the way there and on the way back."""

    out: tuple[tuple[int, Span], ...]
    out_counts: tuple[list[int], list[int]]
    """Leaving, arriving."""
    work: tuple[_Assembly, ...]
    back: tuple[tuple[int, Span], ...]
    back_counts: tuple[list[int], list[int]]


class WholeMatrices:
    """The matrices of some segments, all replicated over the same mesh axes and stored in one dtype.

    Made collectively by the ranks along these axes and `tp`. `cost` gives what a matrix of some shape takes to compute,
    by which the work is shared out.
    """

    def __init__(self, segments: Sequence[Segment], mesh: Mesh, cost: Callable[[tuple[int, ...]], float]) -> None:
        bucket = segments[0].bucket
        self.dtype = bucket.dtype
        self._group = mesh.group(*bucket.slots[0].parameter.placement.reduce, "tp")
        self._data, self._tensor = bucket.group.size, mesh.tp
        own = [share.json() for share in _shares(segments, mesh.rank)]
        self._shares: list[dict[str, list[_Share]]] = []
        for theirs in mesh.group("tp").gather_json(own, mesh.device):
            by_name: dict[str, list[_Share]] = {}
            for share in map(_Share.of_json, theirs):
                by_name.setdefault(share.name, []).append(share)
            self._shares.append(by_name)
        self.shapes = {name: shares[0].shape for by_name in self._shares for name, shares in by_name.items()}
        self.plan = share_out(self.shapes, self._group.size, cost)
        self._rounds = [self._round(names) for names in self.plan]

    @property
    def own(self) -> list[str]:
        """The matrices that this rank works on."""
        return [name for names in self.plan for name in names[self._group.index]]

    def _shares_of(self, name: str, tensor: int) -> Iterable[_Share]:
        return self._shares[tensor].get(name, ())

    def _round(self, names: Sequence[Sequence[str]]) -> _Round:
        """The round in which each rank of the group works on its `names`."""
        data, tensor = divmod(self._group.index, self._tensor)

        def held(*, sent: bool) -> tuple[tuple[tuple[int, Span], ...], list[int]]:
            """This rank's pieces, by worker, and their elements for each worker."""
            found, counts = [], [0] * len(names)
            for worker, theirs in enumerate(names):
                for share in (share for name in theirs for share in self._shares_of(name, tensor)):
                    for where, _ in share.pieces(data, self._data, sent=sent):
                        found.append((share.segment, where))
                        counts[worker] += where[1] - where[0]
            return tuple(found), counts

        mine = names[self._group.index]
        arriving, arriving_counts = self._handled(mine, sent=True)
        leaving, leaving_counts = self._handled(mine, sent=False)
        (out, out_counts), (back, back_counts) = held(sent=True), held(sent=False)
        work = []
        for name in mine:
            shares = [share for tensor in range(self._tensor) for share in self._shares_of(name, tensor)]
            parts = [(share, tuple(arriving.get(id(share), ())), tuple(leaving.get(id(share), ()))) for share in shares]
            work.append(_Assembly(self.shapes[name], tuple(parts)))
        return _Round(out, (out_counts, arriving_counts), tuple(work), back, (leaving_counts, back_counts))

    def _handled(self, names: Sequence[str], *, sent: bool) -> tuple[dict[int, list[tuple[Span, Span]]], list[int]]:
        """What the worker on `names` gets from (`sent`) or gives to all ranks: by share, (elements of its buffer,
        elements of the flattened box); and the elements for each rank."""
        found: dict[int, list[tuple[Span, Span]]] = {}
        counts, position = [0] * self._group.size, 0
        for rank in range(self._group.size):
            data, tensor = divmod(rank, self._tensor)
            for share in (share for name in names for share in self._shares_of(name, tensor)):
                for _, (start, stop) in share.pieces(data, self._data, sent=sent):
                    end = position + stop - start
                    found.setdefault(id(share), []).append(((position, end), (start, stop)))
                    counts[rank] += stop - start
                    position = end
        return found, counts

    def replace(self, values: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> None:
        """Put `compute(matrix)` (same shape) in the place of every whole matrix in `values`, one flat fp32 tensor for
        each segment; collective. Matrices and results travel in the parameters' dtype."""
        started = self._send(self._rounds[0], values) if self._rounds else None
        returning: tuple[_Round, Tensor, Work, Tensor] | None = None
        for number, this in enumerate(self._rounds):
            assert started is not None
            arrived, work, _ = started
            work.wait()
            started = self._send(self._rounds[number + 1], values) if number + 1 < len(self._rounds) else None
            leaving_counts, back_counts = this.back_counts
            leaving = torch.empty(sum(leaving_counts), dtype=self.dtype, device=arrived.device)
            for assembly in this.work:
                assembly.scatter(compute(assembly.gather(arrived)), leaving)
            back = torch.empty(sum(back_counts), dtype=self.dtype, device=arrived.device)
            if returning is not None:
                _take(returning, values)
            returning = this, back, self._group.all_to_all(back, leaving, back_counts, leaving_counts), leaving
        if returning is not None:
            _take(returning, values)

    def _send(self, this: _Round, values: Sequence[Tensor]) -> tuple[Tensor, Work, Tensor]:
        """Start to send this rank's pieces: (what arrives, its work, what leaves and must live as long)."""
        leaving_counts, arriving_counts = this.out_counts
        device = values[0].device
        leaving = torch.empty(sum(leaving_counts), dtype=self.dtype, device=device)
        position = 0
        for segment, (start, stop) in this.out:
            leaving[position : position + stop - start].copy_(values[segment][start:stop])
            position += stop - start
        arrived = torch.empty(sum(arriving_counts), dtype=self.dtype, device=device)
        return arrived, self._group.all_to_all(arrived, leaving, arriving_counts, leaving_counts), leaving


def _take(returning: tuple[_Round, Tensor, Work, Tensor], values: Sequence[Tensor]) -> None:
    """Write what has come back into `values`."""
    this, back, work, _ = returning
    work.wait()
    position = 0
    for segment, (start, stop) in this.back:
        values[segment][start:stop].copy_(back[position : position + stop - start])
        position += stop - start


def _shares(segments: Sequence[Segment], rank: int) -> Iterator[_Share]:
    for number, segment in enumerate(segments):
        bucket = segment.bucket
        for slot in bucket.slots:
            shape = tuple(slot.parameter.shape)
            for box in slot.parameter.placement.boxes:
                ranges = tuple((slot.start + start, slot.start + stop) for start, stop in flat_ranges(box, shape))
                yield _share(box, ranges, number, segment, owned=box.owner == rank)


def _share(box: Box, ranges: tuple[Span, ...], number: int, segment: Segment, *, owned: bool) -> _Share:
    bucket = segment.bucket
    sharded = segment.span.stop - segment.span.start < bucket.length
    return _Share(box.name, box.shape, box.offset, box.size, ranges, number, bucket.length, sharded, owned)


def share_out(
    shapes: Mapping[str, tuple[int, ...]], ranks: int, cost: Callable[[tuple[int, ...]], float]
) -> list[list[list[str]]]:
    """For each round and rank the matrices that it works on. Dealt out costliest first, each to the rank with least."""
    loads = [(0.0, rank) for rank in range(ranks)]
    rounds: list[list[list[str]]] = []
    at, filled = [-1] * ranks, [0] * ranks
    for name in sorted(shapes, key=lambda name: (-cost(shapes[name]), name)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost(shapes[name]), rank))
        elements = shapes[name][0] * shapes[name][1]
        if at[rank] < 0 or filled[rank] + elements > ROUND_ELEMENTS:
            at[rank], filled[rank] = at[rank] + 1, 0
        if at[rank] == len(rounds):
            rounds.append([[] for _ in range(ranks)])
        filled[rank] += elements
        rounds[at[rank]][rank].append(name)
    return rounds
