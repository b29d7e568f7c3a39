"""The vocabulary-parallel output layer with a fused loss that never materialises the logits of a whole micro-batch.

N = S * B tokens of the micro-batch, n tokens of one chunk, H hidden, V vocabulary, v this rank's padded share of it.

The loss of a step is a sum over tokens times one scale that is known before the first forward pass (megalite
normalises once, by the global count of valid tokens). So the gradient of the logits is final as soon as the logits
exist: a chunk's logits are turned into their gradient in place, multiplied into the gradients of hidden state and
weight, and dropped. Memory is 2 n v elements instead of 2 N v. The tensor ranks communicate once per chunk: each
contributes (max, sum of exponentials, target logit) of its columns, and every rank merges the gathered statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalite.config import ModelConfig
from megalite.kernels import Kernels
from megalite.kernels.cross_entropy import IGNORE_INDEX, add_product_, chunk_rows, cross_entropy_loss, merge_stats
from megalite.parallel.collectives import TensorRegion, all_gather_stacked
from megalite.parallel.linear import add_weight_gradient
from megalite.parallel.overlap import GatheredRows, SummedRows
from megalite.placement import PlacedParameter


def _weight_total(weight: PlacedParameter) -> tuple[Tensor | None, bool]:
    """(tensor to accumulate the weight's gradient in, whether it is a temporary to return to autograd instead of the
    gradient buffer); None for a frozen weight."""
    if not weight.requires_grad:
        return None, False
    total = weight.grad_buffer()
    if total is not None:
        return total, False
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device), True


class _HeadLoss(Function):
    """(hidden_sBH, weight_vH, labels_N) -> scale * sum of token losses (fp64 scalar); must be the root of backward."""

    spmd = "hidden_sBH: V|I, weight: V -> I; data P"

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
        hidden = GatheredRows(region, hidden_sBH)
        gradient = SummedRows(region, torch.empty_like(hidden.whole)) if train else None
        total, own = _weight_total(weight) if train else (None, False)
        loss = torch.zeros((), dtype=torch.float64, device=hidden_sBH.device)
        for chunk in head.chunks(hidden.rows_NH):
            grad_nH = None if gradient is None else gradient.rows_NH[chunk]
            loss += head.chunk_loss(hidden.take(chunk), labels_N[chunk], scale, grad_nH, total)
            if gradient is not None:
                gradient.made(chunk.stop)
        if gradient is not None:
            ctx.save_for_backward(gradient.finish())
            ctx.weight, ctx.own = weight, total if own else None
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_sBH,) = ctx.saved_tensors
        weight: PlacedParameter = ctx.weight
        if ctx.own is not None:
            return grad_sBH * grads[0], (ctx.own * grads[0]).to(weight.dtype), None, None, None, None
        if weight.requires_grad:
            weight.gradient_added()
        return grad_sBH, None, None, None, None, None


class _LabelLogprobs(Function):
    """(hidden_sBH, weight_vH, labels_N) -> log-probabilities of the labels [N], fp32; backward recomputes the logits.

    For objectives that are not a sum of token losses: their gradient is known only after the whole batch has been
    seen, so each chunk's logits are dropped in forward and recomputed in backward (four GEMMs instead of three). Only
    hidden state, labels and three numbers per token are saved.
    """

    spmd = "hidden_sBH: V|I, weight: V -> I"

    @staticmethod
    def forward(ctx: Any, hidden_sBH: Tensor, weight: PlacedParameter, labels_N: Tensor, head: Any) -> Tensor:
        hidden = GatheredRows(head.region, hidden_sBH)
        chunks = list(head.chunks(hidden.rows_NH))
        stats = [head.stats(head.local_logits(hidden.take(chunk)), labels_N[chunk]) for chunk in chunks]
        losses = [
            cross_entropy_loss(part, labels_N[chunk], vocab_size=head.vocab_size) for part, chunk in zip(stats, chunks)
        ]
        ctx.save_for_backward(hidden_sBH, labels_N)
        ctx.stats, ctx.weight, ctx.head = stats, weight, head
        return torch.cat(losses).neg_()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden_sBH, labels_N = ctx.saved_tensors
        weight, head = ctx.weight, ctx.head
        hidden = GatheredRows(head.region, hidden_sBH)
        gradient = SummedRows(head.region, torch.empty_like(hidden.whole))
        total, own = _weight_total(weight)
        for stats, chunk in zip(ctx.stats, head.chunks(hidden.rows_NH)):
            hidden_nH, labels_n = hidden.take(chunk), labels_N[chunk]
            logits_nv = head.local_logits(hidden_nH)
            scale_n = torch.where(labels_n == IGNORE_INDEX, 0.0, -grads[0][chunk])
            slope = head.slope(logits_nv)
            head.to_gradient_(logits_nv, labels_n, stats, scale_n, z_loss=0.0)
            if slope is not None:
                logits_nv.mul_(slope)
            torch.mm(logits_nv, weight.gathered(), out=gradient.rows_NH[chunk])
            if total is not None:
                add_product_(total, logits_nv, hidden_nH)
            gradient.made(chunk.stop)
        grad_sBH = gradient.finish()
        if own:
            assert total is not None
            return grad_sBH, total.to(weight.dtype), None, None
        if weight.requires_grad:
            weight.gradient_added()
        return grad_sBH, None, None, None


class VocabParallelHead(nn.Module):
    """The output layer: hidden [s, B, H] to logits over the vocabulary, or straight to the loss.

    Of `weight` [v, H] the first `valid` rows are tokens from `first` on; the rest is padding.
    """

    def __init__(
        self,
        weight: PlacedParameter,
        first: int,
        valid: int,
        region: TensorRegion,
        kernels: Kernels,
        model: ModelConfig,
        *,
        z_loss: float,
    ) -> None:
        super().__init__()
        self.weight, self.first, self.valid = weight, first, valid
        self.vocab_size, self.z_loss = model.vocab_size, z_loss
        self.scaling, self.softcap = model.logits_scaling, model.final_logit_softcapping
        self.region, self.kernels = region, kernels

    def chunks(self, hidden_NH: Tensor) -> Iterator[slice]:
        """Chunks of tokens whose logits are in memory at a time; on GPUs a multiple of the GEMM tile size."""
        rows = chunk_rows(self.weight.shape[0], hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], rows):
            yield slice(start, start + rows)

    def local_logits(self, hidden_nH: Tensor) -> Tensor:
        """This rank's columns of the logits, [n, v]: of z = hidden @ weight^T, softcap(z / scaling)."""
        return self._bounded(functional.linear(hidden_nH, self.weight.gathered()))

    def _bounded(self, logits_nv: Tensor) -> Tensor:
        """softcap(z / scaling), in place."""
        if self.scaling != 1.0:
            logits_nv = logits_nv.div_(self.scaling)
        if self.softcap:
            logits_nv = logits_nv.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nv

    def slope(self, logits_nv: Tensor) -> Tensor | float | None:
        """The derivative of `local_logits` by z: what turns a gradient of logits into one of z; None for 1."""
        if not self.softcap:
            return None if self.scaling == 1.0 else 1.0 / self.scaling
        return (logits_nv / self.softcap).square_().neg_().add_(1.0).div_(self.scaling)

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
        if grad_nH is None:
            stats_n3 = self.chunk_stats(hidden_nH, labels_n)
        else:
            scale_n = torch.where(labels_n == IGNORE_INDEX, 0.0, scale).to(torch.float32)
            stats_n3 = self.chunk_gradients(hidden_nH, labels_n, scale_n, grad_nH, total_vH)
        loss_n = cross_entropy_loss(stats_n3, labels_n, vocab_size=self.vocab_size, z_loss=self.z_loss)
        return loss_n.sum(dtype=torch.float64) * scale

    def chunk_stats(self, hidden_nH: Tensor, labels_n: Tensor) -> Tensor:
        """One chunk's statistics, as of `stats`."""
        return self.stats(self.local_logits(hidden_nH), labels_n)

    def chunk_gradients(
        self, hidden_nH: Tensor, labels_n: Tensor, scale_n: Tensor, grad_nH: Tensor, total_vH: Tensor | None
    ) -> Tensor:
        """The same, and both gradients of `scale_n` times the token losses."""
        logits_nv = self.local_logits(hidden_nH)
        slope = self.slope(logits_nv)
        stats_n3 = self._stats_and_gradient(logits_nv, labels_n, scale_n)
        if slope is not None:
            logits_nv.mul_(slope)
        torch.mm(logits_nv, self.weight, out=grad_nH)
        if total_vH is not None:
            add_product_(total_vH, logits_nv, hidden_nH)
        return stats_n3

    def stats(self, logits_nv: Tensor, labels_n: Tensor) -> Tensor:
        """(max, sum of exponentials, logit of the label) over the whole vocabulary for each token."""
        stats = self.kernels.cross_entropy_stats(logits_nv, labels_n, vocab_start=self.first, valid=self.valid)
        if self.region.group.size > 1:
            stats = merge_stats(all_gather_stacked(stats, self.region.group))
        return stats

    def to_gradient_(
        self, logits_nv: Tensor, labels_n: Tensor, stats: Tensor, scale_n: Tensor, *, z_loss: float
    ) -> None:
        """Turn logits into `scale_n` times the gradient of the token losses, in place."""
        self.kernels.cross_entropy_grad_(
            logits_nv, labels_n, stats, scale_n, vocab_start=self.first, valid=self.valid, z_loss=z_loss
        )

    def _stats_and_gradient(self, logits_nv: Tensor, labels_n: Tensor, scale_n: Tensor) -> Tensor:
        """The statistics; the logits become their gradient, in a single kernel when the vocabulary is not split."""
        if self.region.group.size == 1:
            return self.kernels.cross_entropy_stats_grad_(
                logits_nv, labels_n, scale_n, valid=self.valid, z_loss=self.z_loss
            )
        stats = self.stats(logits_nv, labels_n)
        self.to_gradient_(logits_nv, labels_n, stats, scale_n, z_loss=self.z_loss)
        return stats

    def logprobs(self, hidden_sBH: Tensor, labels_BS: Tensor) -> Tensor:
        """Log-probabilities of the labels, fp32 [B, S], 0 where `IGNORE_INDEX`; differentiable; equal on all ranks."""
        flat_N = _LabelLogprobs.apply(hidden_sBH, self.weight, labels_BS.t().flatten(), self)
        return flat_N.view(labels_BS.shape[1], labels_BS.shape[0]).t()

    @torch.no_grad()
    def label_stats(self, hidden_sBH: Tensor, labels_BS: Tensor) -> Tensor:
        """[2, B, S] fp32: log-probability of each label, and 1 where the label is the argmax; 0 for `IGNORE_INDEX`."""
        stats_2N = self._label_stats(self.region.gather(hidden_sBH).flatten(0, 1), labels_BS.t().flatten())
        return stats_2N.view(2, labels_BS.shape[1], labels_BS.shape[0]).transpose(1, 2)

    @torch.no_grad()
    def label_stats_at(self, hidden_sBH: Tensor, places_N: Tensor, labels_N: Tensor) -> Tensor:
        """The same of N labels at places of the micro-batch, [2, N] fp32; place = position * B + row. Only these
        places' logits are computed, and a place may have several labels."""
        return self._label_stats(self.region.gather(hidden_sBH).flatten(0, 1)[places_N], labels_N)

    def _label_stats(self, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        parts = [torch.empty((2, 0), device=hidden_NH.device)]
        for chunk in self.chunks(hidden_NH):
            stats = self.stats(self.local_logits(hidden_NH[chunk]), labels_N[chunk])
            loss_n = cross_entropy_loss(stats, labels_N[chunk], vocab_size=self.vocab_size)
            likeliest_n = (stats[..., 2] >= stats[..., 0]) & (labels_N[chunk] != IGNORE_INDEX)
            parts.append(torch.stack((-loss_n, likeliest_n.to(loss_n.dtype))))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def token_logprobs(self, logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
        """The log-probabilities of tokens, fp32 [B], from `logits`, by the same arithmetic as `logprobs`."""
        stats_B3 = self.kernels.cross_entropy_stats(logits_BV, tokens_B)
        return cross_entropy_loss(stats_B3, tokens_B, vocab_size=self.vocab_size).neg_()

    @torch.no_grad()
    def logits(self, hidden_sBH: Tensor) -> Tensor:
        """Logits over the true vocabulary on every tensor rank: [S, B, V], for generation and evaluation."""
        logits_SBv = self.local_logits(self.region.gather(hidden_sBH))
        stacked = all_gather_stacked(logits_SBv, self.region.group)
        return stacked.movedim(0, 2).flatten(2)[..., : self.vocab_size]


class _Score(Function):
    """(hidden_sBH, weight_1H) -> values_SB, fp32, equal on all tensor ranks.

    Every rank computes the whole loss from them, so in backward each takes its own part along the sequence without a
    reduction."""

    spmd = "hidden_sBH: V|I, weight: R|I -> I"

    @staticmethod
    def forward(ctx: Any, hidden_sBH: Tensor, weight: PlacedParameter, region: TensorRegion) -> Tensor:
        ctx.save_for_backward(hidden_sBH)
        ctx.weight, ctx.region = weight, region
        values_sB = functional.linear(hidden_sBH.float(), weight.gathered().float()).squeeze(-1)
        return region.gather(values_sB)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (hidden_sBH,), weight, region = ctx.saved_tensors, ctx.weight, ctx.region
        grad_sB1 = region.own(grads[0]).unsqueeze(-1)
        grad_sBH = (grad_sB1 * weight.gathered().float()).to(hidden_sBH.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if weight.requires_grad:
            grad_weight = add_weight_gradient(weight, grad_sB1, hidden_sBH.float())
        return grad_sBH, None if grad_weight is None else grad_weight.to(weight.dtype), None


class ScalarHead(nn.Module):
    """hidden [s, B, H] -> one value per position, fp32 [B, S]: the head of reward and value models.

    Its weight [1, H] is replicated over the tensor ranks, like a norm's.
    """

    def __init__(self, weight: PlacedParameter, region: TensorRegion) -> None:
        super().__init__()
        self.weight, self.region = weight, region

    def forward(self, hidden_sBH: Tensor) -> Tensor:
        return _Score.apply(hidden_sBH, self.weight, self.region).t()
