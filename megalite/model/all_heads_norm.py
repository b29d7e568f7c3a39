"""RMSNorm over the queries, or the keys, of all heads together, while the heads are split over the tensor ranks.

S sequence, B micro-batch, n heads of this rank, D head dim, f = n * D elements of this rank.

With r = 1 / rms over all F elements of all ranks, u = x r, h = grad * weight: y = u weight, dx = r (h - u sum(h u)/F).
Both sums over elements are sums over ranks, of one fp32 number a token. A key head that several ranks hold counts once:
in the forward sum on its first holder, and in backward, where every holder's gradient is a part of the whole one,
all parts go into the sum and the term with u is left to the first holder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megalite.mesh import Group
from megalite.model.build import Build
from megalite.model.norm import RMSNorm
from megalite.placement import Box


class AllHeadsNorm(nn.Module):
    """heads [S, B, n, D] -> the same, normalised over all (OLMo 2); `boxes` are this rank's part of the weight."""

    def __init__(self, build: Build, boxes: tuple[Box, ...]) -> None:
        super().__init__()
        features = sum(box.size[0] for box in boxes)
        weight = build.parameter(boxes[0].name, (features,), boxes, init=build.norm_init, role="vector")
        self.norm = RMSNorm(weight, build.model.norm_eps, build.kernels, build.model.zero_centered_norm)
        self.group, self.total = build.region.group, boxes[0].shape[0]
        counts = [torch.full(box.size, float(box.owner == build.mesh.rank)) for box in boxes]
        self.counts_f: Tensor
        self.register_buffer("counts_f", torch.cat(counts).to(build.mesh.device), persistent=False)

    def forward(self, x_SBnD: Tensor) -> Tensor:
        x_SBf = x_SBnD.flatten(2)
        if self.group.size == 1:
            return self.norm(x_SBf).view(x_SBnD.shape)
        y_SBf = _SplitNorm.apply(x_SBf, self.norm.factors, self.counts_f, self.norm.eps, self.total, self.group)
        return y_SBf.view(x_SBnD.shape)


class _SplitNorm(Function):
    """x_SBf -> y_SBf; the order of casts is that of `megalite.kernels.rms_norm`."""

    spmd = "x_SBf: V, weight_f: V -> V"

    @staticmethod
    def forward(
        ctx: Any, x_SBf: Tensor, weight_f: Tensor, counts_f: Tensor, eps: float, total: int, group: Group
    ) -> Tensor:
        wide_SBf = x_SBf.float()
        mean_SB1 = (wide_SBf.square() * counts_f).sum(-1, keepdim=True)
        group.all_reduce(mean_SB1).wait()
        rstd_SB1 = torch.rsqrt(mean_SB1 / total + eps)
        ctx.save_for_backward(x_SBf, weight_f, counts_f, rstd_SB1)
        ctx.total, ctx.group = total, group
        return ((wide_SBf * rstd_SB1).to(x_SBf.dtype) * weight_f).to(x_SBf.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_SBf, weight_f, counts_f, rstd_SB1 = ctx.saved_tensors
        normed_SBf, grad_SBf = x_SBf.float() * rstd_SB1, grads[0].float()
        product_SBf = grad_SBf * normed_SBf
        mean_SB1 = (product_SBf * weight_f).sum(-1, keepdim=True)
        work = ctx.group.all_reduce(mean_SB1)
        grad_weight_f = product_SBf.sum((0, 1)).to(weight_f.dtype)
        work.wait()
        grad_x_SBf = (grad_SBf * weight_f - normed_SBf * counts_f * (mean_SB1 / ctx.total)) * rstd_SB1
        return grad_x_SBf.to(x_SBf.dtype), grad_weight_f, None, None, None, None
