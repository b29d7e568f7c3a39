"""The vocabulary-parallel embedding.

Shapes: S sequence of the micro-batch, s its part outside tensor-parallel blocks, B micro-batch, N = S * B tokens,
H hidden, V padded vocabulary, v = V / tp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalite.parallel.collectives import TensorRegion
from megalite.placement import Box, PlacedParameter, row_box


class _Embed(Function):
    """ids_SB -> hidden_sBH. Each rank looks up the ids it holds, with zeros elsewhere; the results are summed."""

    spmd = "weight: V -> V|I"

    @staticmethod
    def forward(ctx: Any, weight: PlacedParameter, ids_SB: Tensor, first: int, region: TensorRegion) -> Tensor:
        local_SB = ids_SB - first
        present_SB = (local_SB >= 0) & (local_SB < weight.shape[0])
        ctx.weight, ctx.region = weight, region
        ctx.save_for_backward(local_SB, present_SB)
        if region.group.size == 1:
            return functional.embedding(local_SB, weight.gathered())
        partial_SBH = functional.embedding(local_SB.where(present_SB, 0), weight.gathered())
        return region.sum(partial_SBH.mul_(present_SB.unsqueeze(-1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        local_SB, present_SB = ctx.saved_tensors
        weight, region = ctx.weight, ctx.region
        grad_SBH, gathered = region.gather_start(grads[0])
        region.deferred.run()
        gathered.wait()
        grad_NH, ids_N = grad_SBH.flatten(0, 1), local_SB.flatten()
        total = weight.grad_buffer()
        dtype = weight.dtype if total is None else total.dtype
        grad_NH = grad_NH.to(dtype)
        if region.group.size > 1:
            # Tokens of other ranks add zeros to row 0: selecting the rows held here would synchronise with the host.
            present_N = present_SB.flatten()
            grad_NH = grad_NH.where(present_N.unsqueeze(1), 0)
            ids_N = ids_N.where(present_N, 0)
        if total is None:
            return torch.zeros_like(weight).index_add_(0, ids_N, grad_NH), None, None, None
        total.index_add_(0, ids_N, grad_NH)
        weight.gradient_added()
        return None, None, None, None


def vocabulary_box(
    name: str, vocab_size: int, hidden_size: int, region: TensorRegion, replicas: tuple[int, ...], parts: int = 1
) -> tuple[int, int, tuple[Box, ...]]:
    """(rows per rank with padding, first row, boxes) of a vocabulary-parallel weight.

    The vocabulary is padded to a multiple of the tensor size, and of `parts` virtual parts of each rank; the last ranks
    may hold fewer true rows, or none. Several `replicas` each have a gradient of their own, a term of the sum.
    """
    rows = -(-vocab_size // (region.group.size * parts)) * parts
    first = region.group.index * rows
    true_rows = max(0, min(vocab_size - first, rows))
    shape = (vocab_size, hidden_size)
    boxes = (row_box(name, shape, first, true_rows, 0, replicas, partial=len(replicas) > 1),) if true_rows else ()
    return rows, first, boxes


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the rows split over the tensor ranks: ids [B, S] (int64) -> hidden [s, B, H].

    `first` is the first row of the vocabulary that this rank holds.
    """

    def __init__(self, weight: PlacedParameter, first: int, region: TensorRegion) -> None:
        super().__init__()
        self.weight, self.first, self.region = weight, first, region

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return _Embed.apply(self.weight, tokens_BS.t(), self.first, self.region)
