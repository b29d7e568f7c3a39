"""The load of the experts over a step: counted on all ranks, reported, and evened out by the routers' biases.

Counts are exact whole numbers of the global batch, so that every rank makes the same update in every layout. It is made
once a step, after the optimizer's, and not at all where the step was refused.

L sparse layers of this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.mesh import Mesh
from megalite.model.router import Router


def expert_metrics(sums: Sequence[float]) -> dict[str, float]:
    """What is reported, from the sums of `Balance.collect`; nothing for a model without experts."""
    return {"aux_loss": sums[0], "expert_load_max": max(sums[1:])} if sums else {}


class Balance:
    """The routers of this rank's stages."""

    def __init__(self, routers: Sequence[Router], mesh: Mesh) -> None:
        self.routers, self.mesh = list(routers), mesh
        self._counts_LE: Tensor | None = None

    def begin(self, tokens: int) -> None:
        """Before a step over `tokens` tokens of the global batch."""
        for router in self.routers:
            router.begin(tokens)

    def collect(self, layers: int) -> tuple[Tensor, ...]:
        """Sum the step's counts over all ranks; then this rank's terms of sums over all ranks, fp64 scalars: of what
        the routers added to the objective, and, for each of the model's `layers`, of the highest load of an expert over
        the mean. `expert_metrics` makes metrics of the sums."""
        device = self.mesh.device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        highest_L = torch.zeros(layers, dtype=torch.float64, device=device)
        if not self.routers:
            return loss, *highest_L
        split = self.routers[0].region.sequence
        self._counts_LE = torch.stack([self._counts(router) for router in self.routers])
        self.mesh.data_group().all_reduce(self._counts_LE).wait()
        if split:
            self.mesh.group("tp").all_reduce(self._counts_LE).wait()
        if split or self.mesh.index("tp") == 0:  # else all tensor ranks hold the same terms
            for router in self.routers:
                loss = loss if router.loss is None else loss + router.loss
        if self.mesh.rank == self.mesh.rank_at(dp=0, ep=0, cp=0, tp=0):
            numbers = torch.tensor([router.layer for router in self.routers], device=device)
            highest_L[numbers] = self._loads(self._counts_LE).amax(-1)
        return loss, *highest_L

    def _counts(self, router: Router) -> Tensor:
        if router.counts_E is None:
            return torch.zeros(router.model.experts, dtype=torch.float64, device=self.mesh.device)
        return router.counts_E

    def _loads(self, counts_LE: Tensor) -> Tensor:
        """Counts over their mean; 1 for all where nothing was counted."""
        means_L1 = counts_LE.mean(-1, keepdim=True)
        return torch.where(means_L1 > 0, counts_LE / means_L1.clamp(min=1e-300), 1.0)

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases by one step towards an even load, and remember the loads."""
        if self._counts_LE is None:
            return
        loads_LE = self._loads(self._counts_LE)
        for router, loads_E in zip(self.routers, loads_LE):
            if router.bias is not None and router.model.router_bias_rate > 0:
                router.bias.add_(torch.sign(1.0 - loads_E).float(), alpha=router.model.router_bias_rate)
            if router.load is not None:
                router.load.copy_(loads_E)
