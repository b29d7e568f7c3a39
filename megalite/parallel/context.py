"""Context parallelism: the ranks of the `cp` axis each hold a part of every sequence.

A sequence is cut into 2 n pieces for n ranks, and rank r has the pieces r and 2 n - 1 - r: under a causal mask the
early pieces see little and the late ones much, and every such pair costs the same. Everything but attention works on
each token alone and sees a shorter sequence. A sequence that does not divide is padded at its end, by tokens that no
other token sees and whose labels do not count.

Attention sees the whole sequence: `megalite.parallel.context_attention`.

Shapes: n ranks, S tokens of a sequence with padding, s = S / n those of this rank, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megalite.config.lengths import padded_length
from megalite.data.batch import Batch
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.mesh import CPU, Group, Mesh

PADDING = -1
"""The document number of padding."""


@dataclass(frozen=True)
class ContextRegion:
    """The ranks that share a sequence, and the rows of it that each has.

    `mode` is `gather`, `ring` or `ulysses`; `split` says into how many parts sequence parallelism cuts each rank's rows
    once more.
    """

    group: Group
    mode: str = "gather"
    split: int = 1
    device: torch.device = CPU

    @staticmethod
    def of(mesh: Mesh, mode: str, split: int) -> ContextRegion:
        """The region of a mesh's `cp` axis."""
        return ContextRegion(mesh.group("cp"), mode, split, mesh.device)

    @staticmethod
    def alone(mesh: Mesh) -> ContextRegion:
        """One rank with all rows of the sequence."""
        return ContextRegion(mesh.alone, device=mesh.device)

    @property
    def size(self) -> int:
        return self.group.size

    def padded(self, length: int) -> int:
        """Tokens of a sequence of `length` with its padding."""
        return padded_length(length, self.size, self.split)

    def part_length(self, length: int) -> int:
        """Tokens on each rank of a sequence of `length`."""
        return self.padded(length) // self.size

    def rows(self, length: int, index: int | None = None) -> Tensor:
        """The rows that the rank at `index` (default: this one) has of a sequence of `length`, int64 [s], ascending."""
        index = self.group.index if index is None else index
        piece, last = self.part_length(length) // 2, 2 * self.size - 1
        starts = (index * piece, (last - index) * piece)
        return torch.cat([torch.arange(start, start + piece, device=self.device) for start in starts])

    def whole(self, parts_ns: Tensor) -> Tensor:
        """The rows in order, [S, ...], from the ranks' parts, [n, s, ...]; a copy."""
        heads, tails = parts_ns.unflatten(1, (2, -1)).unbind(1)
        return torch.cat((heads, tails.flip(0))).flatten(0, 1)

    def by_rank(self, whole_S: Tensor) -> Tensor:
        """The ranks' parts, [n, s, ...], from the rows in order, [S, ...]; a copy."""
        heads, tails = whole_S.unflatten(0, (2, self.size, -1)).unbind(0)
        return torch.stack((heads, tails.flip(0)), 1).flatten(1, 2)

    def gather_rows(self, part_s: Tensor) -> Tensor:
        """The rows of all ranks in order, [S, ...], from this rank's, [s, ...]."""
        parts_ns = part_s.new_empty((self.size, *part_s.shape))
        self.group.all_gather(parts_ns.flatten(0, 1), part_s.contiguous()).wait()
        return self.whole(parts_ns)

    def pad(self, x_BS: Tensor, value: int) -> Tensor:
        """A tensor of a whole sequence, [B, true length], with `value` for the padding."""
        return functional.pad(x_BS, (0, self.padded(x_BS.shape[1]) - x_BS.shape[1]), value=value)

    def cut(self, batch: Batch) -> Batch:
        """This rank's part of a micro-batch."""
        if self.size == 1:
            return batch
        rows_s = self.rows(batch.tokens_BS.shape[1])

        def part(x_BS: Tensor, value: int) -> Tensor:
            return self.pad(x_BS, value).index_select(1, rows_s)

        return Batch(
            part(batch.tokens_BS, 0),
            part(batch.labels_BS, IGNORE_INDEX),
            None if batch.positions_BS is None else part(batch.positions_BS, 0),
            None if batch.documents_BS is None else part(batch.documents_BS, PADDING),
            {name: part(column, 0) for name, column in batch.columns.items()},
        )

    def gather(self, x_Bs: Tensor, length: int) -> Tensor:
        """The whole sequence [..., B, length] on every rank, from each rank's part [..., B, s]; differentiable.

        All ranks must go on to compute the same from it: each takes the gradient of its own part.
        """
        if self.size == 1:
            return x_Bs
        result: Tensor = _Gather.apply(x_Bs, length, self)
        return result


class _Gather(Function):
    spmd = "x_Bs: V -> I"

    @staticmethod
    def forward(ctx: Any, x_Bs: Tensor, length: int, region: ContextRegion) -> Tensor:
        ctx.region = region
        return region.gather_rows(x_Bs.movedim(-1, 0))[:length].movedim(0, -1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor) -> Any:
        region: ContextRegion = ctx.region
        length = grad_BS.shape[-1]
        padded = functional.pad(grad_BS, (0, region.padded(length) - length))
        return padded.index_select(-1, region.rows(length)), None, None
