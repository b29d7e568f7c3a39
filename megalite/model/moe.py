"""The sparse feed-forward layer: every token goes through a few of many SwiGLU experts. No token is ever dropped.

The experts are split over the ranks along `ep`, which read different data, and each expert's width over the tensor
ranks. Sources: Shazeer et al. 2017, Lepikhin et al. 2020 (experts on ranks), Dai et al. 2024 (shared experts).

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden, K experts of a token, N = S B K rows
(one for each token and expert), M rows for this rank's experts, F an expert's width, f this rank's part, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalite.mesh import DATA_AXES, EXPERT_DATA_AXES
from megalite.model.build import Build
from megalite.model.feed_forward import GatedFeedForward
from megalite.model.router import Router
from megalite.parallel.experts import Exchange, GroupedLinear, Sorting, collect, exchange_counts, spread
from megalite.placement import Box, row_box, split_evenly


class MixtureOfExperts(nn.Module):
    """hidden [s, B, H] -> sum over the token's experts of weight * expert(x), plus shared experts(x) [s, B, H]."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, mesh, prefix = build.model, build.mesh, f"model.layers.{layer}.mlp"
        self.experts, self.copies = model.experts, model.experts_per_token
        self.region, self.group, self.kernels = build.region, mesh.group("ep"), build.kernels
        self.alone = build.alone_region
        self.router = Router(build, layer)
        first, count = split_evenly(model.experts, mesh.ep, mesh.index("ep"))
        self.gate_up, self.down = _expert_matrices(build, prefix, range(first, first + count))
        self.shared: GatedFeedForward | None = None
        if model.shared_experts:
            width = model.shared_experts * model.expert_ffn_hidden_size
            self.shared = GatedFeedForward(build, f"{prefix}.shared_experts", width)

    def forward(self, x_sBH: Tensor, *, recompute: bool = False) -> Tensor:
        choice = self.router(x_sBH)
        shape = (x_sBH.shape[0] * self.region.split, *x_sBH.shape[1:])
        experts_N = self.region.gather(choice.experts_sBK).flatten()
        counts_E = torch.zeros(self.experts, dtype=torch.int64, device=x_sBH.device)
        counts_E.scatter_add_(0, experts_N, torch.ones_like(experts_N))
        sorting = Sorting.of(experts_N)
        x_NH = spread(x_sBH, sorting, self.copies, self.region)
        weights_N1 = spread(choice.weights_sBK.unsqueeze(-1), sorting, 1, self.region)

        def shared() -> Tensor | None:
            return None if self.shared is None else self.shared(x_sBH, recompute=recompute)

        if self.group.size == 1:
            beside_sBH = shared()
            out_NH = self._compute(x_NH, weights_N1, counts_E.cumsum(0))
        else:
            out_NH, beside_sBH = self._compute_elsewhere(x_NH, weights_N1, counts_E, shared)
        out_sBH = collect(out_NH, sorting, self.copies, self.region, shape)
        return out_sBH if beside_sBH is None else out_sBH + beside_sBH

    def _compute(self, x_MH: Tensor, weights_M1: Tensor, ends_G: Tensor) -> Tensor:
        """Weighted outputs [M, H] of this rank's experts for rows sorted by expert (with tensor parallelism, terms)."""
        gate_up_MF = self.gate_up(ends_G, x_MH)
        return self.down(ends_G, gate_up_MF, weights_M1, prologue=self._activation)

    def _activation(self, gate_up_MF: Tensor, weights_M1: Tensor) -> Tensor:
        # Weighting here, not after the product, spares keeping the experts' outputs for the weights' gradient.
        inner_Mf = self.kernels.swiglu(gate_up_MF)
        return inner_Mf * weights_M1.to(inner_Mf.dtype)

    def _compute_elsewhere(
        self, x_NH: Tensor, weights_N1: Tensor, counts_E: Tensor, beside: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The same on the ranks that hold the experts; `beside` runs while the rows travel there."""
        arriving_RG, leaving, arriving = exchange_counts(counts_E, self.group)
        rows, weights = (Exchange(self.group, leaving, arriving) for _ in range(2))
        x_buffer, weights_buffer = rows.start(x_NH), weights.start(weights_N1)
        beside_sBH = beside()
        self.region.turns.give()
        x_MH, weights_M1 = rows.finish(x_buffer), weights.finish(weights_buffer)
        # Rows come sorted by the rank they come from, and then by expert.
        here_G = torch.arange(arriving_RG.shape[1], device=x_NH.device)
        experts_M = here_G.repeat(len(arriving_RG)).repeat_interleave(arriving_RG.flatten(), output_size=len(x_MH))
        by_expert = Sorting.of(experts_M)
        out_MH = self._compute(
            spread(x_MH, by_expert, 1, self.alone),
            spread(weights_M1, by_expert, 1, self.alone),
            arriving_RG.sum(0).cumsum(0),
        )
        out_MH = collect(out_MH, by_expert, 1, self.alone, tuple(out_MH.shape))
        back = Exchange(self.group, arriving, leaving)
        out_buffer = back.start(out_MH)
        self.region.turns.give()
        return back.finish(out_buffer), beside_sBH


def _expert_matrices(build: Build, prefix: str, experts: range) -> tuple[GroupedLinear, GroupedLinear]:
    """Gate and up of each of these experts in one matrix, and down; one expert below another."""
    model, mesh = build.model, build.mesh
    hidden, ffn, here = model.hidden_size, model.expert_ffn_hidden_size, (mesh.rank,)
    start, length = split_evenly(ffn, mesh.tp, mesh.index("tp"))
    reduce = EXPERT_DATA_AXES if mesh.ep > 1 else DATA_AXES
    inner: list[Box] = []
    outer: list[Box] = []
    for place, expert in enumerate(experts):
        name = f"{prefix}.experts.{expert}"
        for part, row in (("gate_proj", 2 * place * length), ("up_proj", (2 * place + 1) * length)):
            inner.append(row_box(f"{name}.{part}.weight", (ffn, hidden), start, length, row, here))
        down = f"{name}.down_proj.weight"
        outer.append(Box(down, (hidden, ffn), (0, start), (hidden, length), (place * hidden, 0), here))
    gate_up = build.parameter(inner[0].name, (2 * length * len(experts), hidden), tuple(inner), reduce=reduce)
    shape = (hidden * len(experts), length)
    down_weight = build.parameter(outer[0].name, shape, tuple(outer), std=build.residual_std, reduce=reduce)
    return GroupedLinear(gate_up, build.kernels, rows=False), GroupedLinear(down_weight, build.kernels, rows=True)
