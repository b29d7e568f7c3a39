"""The build context of a model whose bits do not depend on the number of ranks (`train.invariant`).

`Build` gives layers their parts; this one gives them parts that compute for each virtual part by itself and sum up the
binary tree (`megalite.parallel.virtual_parts`). Layers know nothing of it.

N = S * B tokens of the micro-batch, n tokens of one chunk, H hidden, v columns of the vocabulary of one virtual part,
D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalite.kernels.cross_entropy import add_product_, chunk_rows, merge_stats
from megalite.model.build import Build
from megalite.model.head import VocabParallelHead
from megalite.model.norm import RMSNorm
from megalite.parallel.collectives import all_gather_stacked
from megalite.parallel.embedding import vocabulary_box
from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalite.parallel.virtual_parts import (
    ColumnParts,
    RowParts,
    kernels_of_parts,
    ranges_of_parts,
    shared_by_parts,
    tree_sum,
)
from megalite.placement import Box, PlacedParameter


class InvariantHead(VocabParallelHead):
    """The output layer with logits and statistics of each virtual part of the vocabulary by itself."""

    parts: int
    own_parts: int
    """Virtual parts of all tensor ranks, and of this one."""

    def chunks(self, hidden_NH: Tensor) -> Iterator[slice]:
        rows = chunk_rows(self.weight.shape[0] // self.own_parts * self.parts, hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], rows):
            yield slice(start, start + rows)

    def _rows(self) -> Iterator[tuple[slice, int, int]]:
        """(rows of the weight, first token, true rows) of each of this rank's parts."""
        each = self.weight.shape[0] // self.own_parts
        for part in range(self.own_parts):
            yield (
                slice(part * each, (part + 1) * each),
                self.first + part * each,
                max(0, min(self.valid - part * each, each)),
            )

    def _logits(self, hidden_nH: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and logits of each part, in memory of their own."""
        weight = self.weight.gathered()
        weights = [weight[rows].clone() for rows, _, _ in self._rows()]
        return weights, [self._bounded(functional.linear(hidden_nH, part_vH)) for part_vH in weights]

    def chunk_stats(self, hidden_nH: Tensor, labels_n: Tensor) -> Tensor:
        return self._merged_stats(self._logits(hidden_nH.clone())[1], labels_n)

    def chunk_gradients(
        self, hidden_nH: Tensor, labels_n: Tensor, scale_n: Tensor, grad_nH: Tensor, total_vH: Tensor | None
    ) -> Tensor:
        hidden_nH, terms = hidden_nH.clone(), []
        weights, logits = self._logits(hidden_nH)
        stats_n3 = self._merged_stats(logits, labels_n)
        for logits_nv, part_vH, (rows, first, valid) in zip(logits, weights, self._rows()):
            slope = self.slope(logits_nv)
            self.kernels.cross_entropy_grad_(
                logits_nv, labels_n, stats_n3, scale_n, vocab_start=first, valid=valid, z_loss=self.z_loss
            )
            if slope is not None:
                logits_nv.mul_(slope)
            terms.append(logits_nv @ part_vH)
            if total_vH is not None:
                gradient = torch.zeros(part_vH.shape, dtype=total_vH.dtype, device=total_vH.device)
                add_product_(gradient, logits_nv, hidden_nH)
                total_vH[rows] += gradient
        grad_nH.copy_(tree_sum(terms))
        return stats_n3

    def _merged_stats(self, logits: list[Tensor], labels_n: Tensor) -> Tensor:
        """The statistics of the whole vocabulary, merged from those of all parts of all ranks at once."""
        own = [
            self.kernels.cross_entropy_stats(logits_nv, labels_n, vocab_start=first, valid=valid)
            for logits_nv, (_, first, valid) in zip(logits, self._rows())
        ]
        return merge_stats(all_gather_stacked(torch.stack(own), self.region.group).flatten(0, 1))


@dataclass(frozen=True)
class InvariantBuild(Build):
    """`parts` is the number of virtual parts of all tensor ranks together, a multiple of their number."""

    parts: int = 1

    make_head: ClassVar[type[VocabParallelHead]] = InvariantHead

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", kernels_of_parts(self.kernels, self.own_parts))

    @property
    def own_parts(self) -> int:
        """Virtual parts of this rank."""
        return self.parts // self.region.size

    def column(self, boxes: tuple[Box, ...], bias_boxes: tuple[Box, ...] = ()) -> nn.Module:
        layer = super().column(boxes, bias_boxes)
        assert isinstance(layer, ColumnParallelLinear)
        # The boxes of one tensor, such as a rank's key heads, lie one after the other.
        sizes: dict[str, int] = {}
        for box in boxes:
            sizes[box.name] = sizes.get(box.name, 0) + box.size[0]
        layer.products = ColumnParts(ranges_of_parts(list(sizes.values()), self.own_parts))
        return layer

    def row(self, name: str, features: tuple[int, int], columns: tuple[int, int]) -> nn.Module:
        layer = super().row(name, features, columns)
        assert isinstance(layer, RowParallelLinear)
        layer.products = RowParts(ranges_of_parts([columns[1]], self.own_parts))
        return layer

    def norm(self, name: str, size: int, *, partial: bool | None = None, eps: float | None = None) -> RMSNorm:
        if not partial:
            return super().norm(name, size, partial=partial, eps=eps)
        weight = self.replicated_parameter(name, (size,), partial=False, init=self.norm_init, role="vector")
        return HeadsNorm(weight, self)

    def head(
        self, name: str, replicas: tuple[int, ...], *, z_loss: float, tied_to: PlacedParameter | None
    ) -> VocabParallelHead:
        head = super().head(name, replicas, z_loss=z_loss, tied_to=tied_to)
        assert isinstance(head, InvariantHead)
        head.parts, head.own_parts = self.parts, self.own_parts
        return head

    def vocabulary(self, name: str, replicas: tuple[int, ...], *, role: str) -> tuple[PlacedParameter, int, int]:
        hidden = self.model.hidden_size
        rows, first, boxes = vocabulary_box(
            name, self.model.vocab_size, hidden, self.region, replicas, parts=self.own_parts
        )
        weight = self.parameter(f"{role}: {name}", (rows, hidden), boxes, role=role)
        return weight, first, sum(box.size[0] for box in boxes)


class HeadsNorm(RMSNorm):
    """A norm of every head by itself, [S, B, heads, D], whose one weight all heads share.

    Its gradient is a sum over heads, and goes up the tree in every backward pass: all ranks have it whole.
    """

    def __init__(self, weight: PlacedParameter, build: InvariantBuild) -> None:
        super().__init__(weight, build.model.norm_eps, build.kernels, build.model.zero_centered_norm)
        self.parts, self.group = build.own_parts, build.region.group

    def forward(self, x: Tensor) -> Tensor:
        weights = shared_by_parts(self.factors, self.parts, self.group)
        cut = zip(x.chunk(self.parts, 2), weights)
        return torch.cat([self.kernels.rms_norm(part.contiguous(), weight, self.eps) for part, weight in cut], 2).to(
            x.dtype
        )
