"""Muon: momentum whose matrices are orthogonalised before they are added to the weights.

For a matrix W [R, C] with gradient G: M = mu M + (1 - mu) G; U = mu M + (1 - mu) G (Nesterov); W -= lr (O + decay W)
with O = 0.2 sqrt(max(R, C)) NS(U). Newton-Schulz iterations bring all singular values of U near 1 with matrix products
alone. Sources: Keller Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (the update and its
coefficients); Liu et al. 2025, arXiv:2502.16982, "Muon is scalable for LLM training" (Moonlight: weight decay, and the
scale, which gives updates the size of AdamW's, so that its learning rate and decay fit).

Every matrix is taken by its global name, whole: q, k, v, gate and up each for itself although they are stored in one
tensor, each expert's for itself, and the router. As in both publications, embedding, output layer and vectors are
AdamW's; so are adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.errors import UserError
from megalite.kernels import Kernels
from megalite.kernels.symmetric import symmetric_product
from megalite.mesh import DATA_AXES, EXPERT_DATA_AXES, Mesh
from megalite.optim.adamw import AdamW
from megalite.optim.shard import Segment
from megalite.optim.whole_matrices import WholeMatrices

MOMENTUM = "momentum_buffer"
"""The name of its state, as of `torch.optim.Muon`."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5: Keller Jordan's quintic. Singular values end between about 0.7 and 1.2, not at 1, but after five
iterations even those that were a thousandth of the norm do."""

EPS = 1e-7
"""Smallest norm that a matrix is divided by."""

RMS = 0.2
"""Root mean square of an update's elements, about that of AdamW's."""


def newton_schulz(matrix: Tensor, steps: int, product: Callable[..., Tensor] = symmetric_product) -> Tensor:
    """U V^T, about, of matrix = U S V^T: [R, C] in its own dtype, computed in it (bf16 is enough: Jordan 2024).
    `product` is the form of `kernels.symmetric`."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix  # X X^T is then the smaller of the two products
    x = x / x.norm(dtype=torch.float32).clamp(min=EPS).to(x.dtype)
    first, third, fifth = COEFFICIENTS
    for _ in range(steps):
        gram = product(x)
        polynomial = product(gram, gram, beta=third, alpha=fifth)  # gram is its own transpose
        x = torch.addmm(x, polynomial, x, beta=first)
    return x.mT if tall else x


def newton_schulz_flops(shape: Sequence[int], steps: int) -> float:
    """FLOPs of the products of `newton_schulz`."""
    small, large = sorted(shape)
    return steps * (4.0 * small * small * large + 2.0 * small**3)


class Muon:
    """The rule: matrices by Muon (state `momentum_buffer`, fp32), all else by AdamW with its own state.

    `lr` is AdamW's; `optimizer.muon_lr` is that of the matrices and follows the same schedule.
    """

    def __init__(self, config: OptimizerConfig, kernels: Kernels, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self._adamw = AdamW(config, kernels, mesh)
        self._product = kernels.symmetric_product
        self._matrices: list[list[Segment]] = []
        self._whole: list[WholeMatrices] = []
        self._others: list[Segment] = []
        # On every rank in the same order, though there may be stages without experts.
        mesh.group(*DATA_AXES, "tp")
        if mesh.ep > 1:
            mesh.group(*EXPERT_DATA_AXES, "tp")

    @property
    def name(self) -> str:
        """For the start-up log."""
        count = sum(len(whole.own) for whole in self._whole)
        steps = self.config.newton_schulz_steps
        return f"Muon ({steps} Newton-Schulz steps, {count} matrices on this rank), {self._adamw.name} for the rest"

    def prepare(self, segments: Sequence[Segment]) -> None:
        kinds: dict[tuple[tuple[str, ...], str], list[Segment]] = {}
        for segment in segments:
            bucket = segment.bucket
            if bucket.role != "matrix" or not bucket.decays:
                self._others.append(segment)
                continue
            _require_matrices(segment)
            segment.state[MOMENTUM] = torch.zeros_like(segment.master.data)
            kinds.setdefault((bucket.slots[0].parameter.placement.reduce, str(bucket.dtype)), []).append(segment)
        self._matrices = list(kinds.values())
        steps = self.config.newton_schulz_steps
        self._whole = [
            WholeMatrices(alike, self.mesh, lambda shape: newton_schulz_flops(shape, steps)) for alike in self._matrices
        ]
        self._adamw.prepare(self._others)

    def update(self, segments: Sequence[Segment], *, lr: float, gradient_scale: float, step: int) -> None:
        rate = lr * (self.config.muon_lr / self.config.lr)
        for alike, whole in zip(self._matrices, self._whole):
            updates = [self._momentum(segment, gradient_scale) for segment in alike]
            whole.replace(updates, self._orthogonalised)
            for segment, update in zip(alike, updates):
                segment.master.mul_(1 - rate * self.config.weight_decay)
                segment.master.add_(update, alpha=-rate)
                segment.write_back()
        self._adamw.update(self._others, lr=lr, gradient_scale=gradient_scale, step=step)

    def _momentum(self, segment: Segment, gradient_scale: float) -> Tensor:
        """Add the gradient to the momentum; what is to be orthogonalised takes the gradient's place."""
        gradient, momentum = segment.gradient, self.config.momentum
        assert gradient is not None
        buffer = segment.state[MOMENTUM].lerp_(gradient.mul_(gradient_scale), 1 - momentum)
        return gradient.lerp_(buffer, momentum)

    def _orthogonalised(self, matrix: Tensor) -> Tensor:
        scale = RMS * max(matrix.shape) ** 0.5
        return newton_schulz(matrix, self.config.newton_schulz_steps, self._product) * scale


def _require_matrices(segment: Segment) -> None:
    for slot in segment.bucket.slots:
        for box in slot.parameter.placement.boxes:
            if len(box.shape) != 2:
                raise UserError(
                    f"optimizer.kind = 'muon' cannot orthogonalise {box.name}, which has {len(box.shape)} dimensions; "
                    "use adamw, or give the parameter a role other than matrix"
                )
