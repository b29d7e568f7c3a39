"""The output layer and its loss, split over the vocabulary, without ever holding the logits of a whole micro-batch.

N = S * B tokens of the micro-batch, n tokens of one chunk, H hidden, V vocabulary, v this rank's padded share of it.

The loss of a step is a sum over tokens times one scale that is known before the first forward pass (megalite
normalises once, by the global count of valid tokens). Therefore the gradient of the logits is final as soon as the
logits are there, and a chunk's logits are turned into the gradient in place, multiplied into the gradients of hidden
state and weight, and dropped: 2 n v numbers instead of 2 N v. The tensor ranks meet once per chunk: each contributes
(max, sum of exponentials, target logit) of its columns, and every rank merges what it has gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalite.kernels import Kernels
from megalite.kernels.cross_entropy import add_product_, cross_entropy_loss, merge_stats
from megalite.parallel.collectives import TensorRegion, all_gather_stacked
from megalite.parallel.linear import vocabulary_box
from megalite.placement import PlacedParameter, Placement

IGNORED = -100
"""The label of a position that takes no part in the loss."""

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}


class _HeadLoss(Function):
    """(hidden_sBH, weight_vH, labels_N) -> scale * sum of token losses (fp64 scalar); must be the root of backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_sBH: Tensor,
        weight: PlacedParameter,
        labels_N: Tensor,
        scale: Tensor | float,
        head: Any,
        train: bool,
    ) -> Tensor:
        region: TensorRegion = head.region
        hidden_NH = region.gather(hidden_sBH).flatten(0, 1)
        grad_NH = torch.empty_like(hidden_NH) if train else None
        total = weight.main_grad if train else None
        if train and total is None:
            total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        step = max(1, _CHUNK_ELEMENTS.get(hidden_NH.device.type, 1 << 22) // weight.shape[0])
        for start in range(0, hidden_NH.shape[0], step):
            chunk = slice(start, start + step)
            loss += head.chunk_loss(
                hidden_NH[chunk], labels_N[chunk], scale, None if grad_NH is None else grad_NH[chunk], total
            )
        if grad_NH is not None:
            grad_SBH = grad_NH.view(-1, *hidden_sBH.shape[1:])
            ctx.save_for_backward(region.sum(grad_SBH))
            ctx.weight, ctx.total = weight, total
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_sBH,) = ctx.saved_tensors
        weight: PlacedParameter = ctx.weight
        if weight.main_grad is None:
            return grad_sBH * grads[0], (ctx.total * grads[0]).to(weight.dtype), None, None, None, None
        weight.gradient_accumulated()
        return grad_sBH, None, None, None, None, None


class VocabParallelHead(nn.Module):
    """The output layer: hidden [s, B, H] to logits over the vocabulary, or straight to the loss.

    `tied_to` is the embedding's weight when both live in this process: the storage is shared, the gradients are kept
    apart and added once a step, as they are when the two live on different pipeline stages.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        replicas: tuple[int, ...],
        region: TensorRegion,
        kernels: Kernels,
        *,
        z_loss: float = 0.0,
        tied_to: PlacedParameter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        rows, self.first, boxes = vocabulary_box(
            name, vocab_size, hidden_size, region, replicas, partial=len(replicas) > 1
        )
        self.valid = sum(box.size[0] for box in boxes)
        self.vocab_size, self.region, self.kernels, self.z_loss = vocab_size, region, kernels, z_loss
        data = torch.empty(rows, hidden_size, **kwargs) if tied_to is None else tied_to.data
        self.weight = PlacedParameter(data, Placement(boxes))
        self.weight.tied_to = tied_to

    def loss(self, hidden_sBH: Tensor, labels_BS: Tensor, scale: Tensor | float) -> Tensor:
        """scale * (sum of the token losses), an fp64 scalar, equal on all tensor ranks.

        Its gradient must be 1: accumulated weight gradients are final when this returns.
        """
        train = torch.is_grad_enabled() and hidden_sBH.requires_grad
        return _HeadLoss.apply(hidden_sBH, self.weight, labels_BS.t().flatten(), scale, self, train)

    def chunk_loss(
        self,
        hidden_nH: Tensor,
        labels_n: Tensor,
        scale: Tensor | float,
        grad_nH: Tensor | None,
        total_vH: Tensor | None,
    ) -> Tensor:
        """One chunk's scaled loss; writes its hidden gradient to `grad_nH`, adds its weight gradient to `total_vH`."""
        logits_nv = functional.linear(hidden_nH, self.weight.ready)
        if grad_nH is None or total_vH is None:
            stats = self._stats(logits_nv, labels_n)
        else:
            scale_n = torch.where(labels_n == IGNORED, 0.0, scale).to(torch.float32)
            stats = self._stats_and_gradient(logits_nv, labels_n, scale_n)
            torch.mm(logits_nv, self.weight, out=grad_nH)
            add_product_(total_vH, logits_nv, hidden_nH)
        loss_n = cross_entropy_loss(stats, labels_n, vocab_size=self.vocab_size, z_loss=self.z_loss)
        return loss_n.sum(dtype=torch.float64) * scale

    def _stats(self, logits_nv: Tensor, labels_n: Tensor) -> Tensor:
        stats = self.kernels.cross_entropy_stats(logits_nv, labels_n, vocab_start=self.first, valid=self.valid)
        if self.region.group.size > 1:
            stats = merge_stats(all_gather_stacked(stats, self.region.group))
        return stats

    def _stats_and_gradient(self, logits_nv: Tensor, labels_n: Tensor, scale_n: Tensor) -> Tensor:
        """The statistics; the logits become their gradient, in one launch where no other rank has a part in them."""
        if self.region.group.size == 1:
            return self.kernels.cross_entropy_stats_grad_(
                logits_nv, labels_n, scale_n, valid=self.valid, z_loss=self.z_loss
            )
        stats = self._stats(logits_nv, labels_n)
        self.kernels.cross_entropy_grad_(
            logits_nv,
            labels_n,
            stats,
            scale_n,
            vocab_start=self.first,
            valid=self.valid,
            z_loss=self.z_loss,
        )
        return stats

    @torch.no_grad()
    def logits(self, hidden_sBH: Tensor) -> Tensor:
        """Logits over the true vocabulary on every tensor rank: [S, B, V], for generation and evaluation."""
        logits_SBv = functional.linear(self.region.gather(hidden_sBH), self.weight.ready)
        stacked = all_gather_stacked(logits_SBv, self.region.group)
        return stacked.movedim(0, 2).flatten(2)[..., : self.vocab_size]
