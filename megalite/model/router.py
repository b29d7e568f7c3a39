"""The router of a sparse layer: which experts a token uses, with what weight, and the losses that balance their load.

Scores are computed in fp32. Sources: Shazeer et al. 2017 (top-k gating), Fedus et al. 2021 (the balancing loss), Zoph
et al. 2022 (z-loss), Wang et al. 2024 (balancing by a bias alone), DeepSeek-V3 2024 (sigmoid scores, groups, the loss
of each sequence).

s sequence outside tensor-parallel blocks, B micro-batch, H hidden, E experts, K experts of a token, T = s B tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalite.config import ModelConfig
from megalite.model.build import STD, Build
from megalite.parallel.linear import add_weight_gradient, now_or_later
from megalite.placement import PlacedParameter

_SMALLEST_SUM = 1e-20
"""Added to the sum of a token's scores before the division by it."""


@dataclass(frozen=True)
class Choice:
    """Experts of each token, int64 [s, B, K], and their weights, fp32 of the same shape."""

    experts_sBK: Tensor
    weights_sBK: Tensor


class _Logits(Function):
    """x_TH (any dtype) -> fp32 logits_TE; the product is taken in fp32 and its operands are kept as they are."""

    spmd = "local"

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight: PlacedParameter) -> Tensor:
        ctx.save_for_backward(x_TH)
        ctx.weight = weight
        return functional.linear(x_TH.float(), weight.gathered().float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x_TH,), (grad_TE,), weight = ctx.saved_tensors, grads, ctx.weight
        grad_x = (grad_TE @ weight.gathered().float()).to(x_TH.dtype)
        return grad_x, now_or_later(weight, lambda: add_weight_gradient(weight, grad_TE, x_TH.float()))


class _Attach(Function):
    """Returns the weights unchanged and gives `loss` the gradient 1; tells the router of it, once a micro-batch.

    It does so in backward, which runs once where a layer is computed twice (recomputation) and not at all where
    nothing is trained.
    """

    spmd = "loss: P|I -> weights"

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, router: Router, counts_E: Tensor) -> Tensor:
        ctx.router, ctx.counts_E, ctx.loss = router, counts_E, loss.detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.router.record(ctx.counts_E, ctx.loss)
        return grads[0], torch.ones_like(ctx.loss), None, None


def choose_experts(scores_TE: Tensor, model: ModelConfig, bias_E: Tensor | None) -> Tensor:
    """The experts [T, K] with the highest score (plus bias), within each token's best groups."""
    scores_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if model.router_groups > 1:
        tokens, groups = scores_TE.shape[0], model.router_groups
        inside_TGe = scores_TE.view(tokens, groups, -1)
        # A group is as good as its best expert, or its best two together (DeepSeek-V2 and V3).
        best = min(2, inside_TGe.shape[2]) if model.router == "sigmoid" else 1
        group_scores_TG = inside_TGe.topk(best, dim=-1).values.sum(-1)
        chosen = group_scores_TG.topk(model.router_groups_per_token, dim=-1).indices
        outside_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
        scores_TE = inside_TGe.masked_fill(outside_TG.unsqueeze(-1), float("-inf")).view(tokens, -1)
    return scores_TE.topk(model.experts_per_token, dim=-1).indices


class Router(nn.Module):
    """x [s, B, H] -> `Choice`. The bias is a tensor of the model and trained by no gradient, as is the load that is
    remembered from step to step; both are fp32 and equal on all ranks.

    During a step of training it collects `counts_E`, how many tokens used each expert, and `loss`, what it adds to
    the objective; `begin` clears them. `tokens` is the number of tokens of the global batch.
    """

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, prefix = build.model, f"model.layers.{layer}.mlp"
        self.model, self.layer, self.region = model, layer, build.region
        self.weight = build.replicated_parameter(f"{prefix}.gate.weight", (model.experts, model.hidden_size), std=STD)
        self.bias = self.load = None
        if model.has_router_bias:
            self.bias = build.state(f"{prefix}.gate.e_score_correction_bias", (model.experts,), init="zeros")
        if model.remembers_load:
            self.load = build.state(f"{prefix}.gate.expert_load", (model.experts,), init="ones")
        cut = ("cp", "tp") if build.region.sequence else ("cp",)
        self.sequence_groups = [build.mesh.group(axis) for axis in cut]
        self.tokens = 0
        self.counts_E: Tensor | None = None
        self.loss: Tensor | None = None

    def begin(self, tokens: int) -> None:
        """Before a step over `tokens` tokens of the global batch."""
        self.tokens, self.counts_E, self.loss = tokens, None, None

    def record(self, counts_E: Tensor, loss: Tensor) -> None:
        self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E
        self.loss = loss if self.loss is None else self.loss + loss

    def forward(self, x_sBH: Tensor) -> Choice:
        length, batch, _ = x_sBH.shape
        logits_TE = _Logits.apply(x_sBH.flatten(0, 1), self.weight)
        scores_TE = logits_TE.softmax(-1) if self.model.router == "softmax" else logits_TE.sigmoid()
        experts_TK = choose_experts(scores_TE.detach(), self.model, self.bias)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.model.router_renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _SMALLEST_SUM)
        weights_TK = weights_TK * self.model.router_scale
        if torch.is_grad_enabled() and self.tokens and weights_TK.requires_grad:
            counts_BE = self._count(experts_TK.view(length, batch, -1))
            loss = self._loss(logits_TE, scores_TE, counts_BE)
            weights_TK = _Attach.apply(weights_TK, loss, self, counts_BE.sum(0))
        shape = (length, batch, -1)
        return Choice(experts_TK.view(shape), weights_TK.view(shape))

    def _count(self, experts_sBK: Tensor) -> Tensor:
        """How many of each sequence's tokens here use each expert, fp64 [B, E]."""
        by_sequence_BN = experts_sBK.transpose(0, 1).flatten(1)
        counts_BE = torch.zeros(len(by_sequence_BN), self.model.experts, dtype=torch.float64, device=experts_sBK.device)
        return counts_BE.scatter_add_(1, by_sequence_BN, torch.ones_like(by_sequence_BN, dtype=torch.float64))

    def _loss(self, logits_TE: Tensor, scores_TE: Tensor, counts_BE: Tensor) -> Tensor:
        """This rank's terms of the balancing loss and the z-loss, each a mean over the global batch; fp64 scalar.

        With f the share of an expert in the choices and p its mean share of the scores, the first is E sum(f p): 1 at
        an even load. f is constant for the gradient.
        """
        model = self.model
        loss = torch.zeros((), dtype=torch.float64, device=logits_TE.device)
        if model.aux_loss > 0:
            shares_TE = scores_TE if model.router == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
            sums_BE = shares_TE.view(-1, len(counts_BE), model.experts).sum(0, dtype=torch.float64)
            loss = loss + model.aux_loss / self.tokens * (self._loads(counts_BE) * sums_BE).sum()
        if model.router_z_loss > 0:
            squares = logits_TE.logsumexp(-1).square().sum(dtype=torch.float64)
            loss = loss + model.router_z_loss / self.tokens * squares
        return loss

    def _loads(self, counts_BE: Tensor) -> Tensor:
        """Tokens of each expert divided by their mean: of each whole sequence [B, E], or of the last global batch."""
        if self.load is not None:
            return self.load.double()
        whole_BE = counts_BE.clone()
        for group in self.sequence_groups:
            group.all_reduce(whole_BE).wait()
        return whole_BE / whole_BE.mean(-1, keepdim=True)
