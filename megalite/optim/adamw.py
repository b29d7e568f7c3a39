"""AdamW over this rank's flat shards, with fp32 master weights.

The element-wise update is our Triton kernel if `kernels.adamw` selects it, else NVIDIA apex's `FusedAdam` if it can be
imported on a GPU, else torch's fused AdamW. Source: Loshchilov and Hutter 2019 (decoupled weight decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.optim.shard import Segment

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"


def _fused_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam, if installed (`apex` on PyPI is another project)."""
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
    except Exception:  # another or a half-built apex fails in many ways, all of which mean: not installed
        return None
    return FusedAdam


class AdamW:
    """The AdamW rule; its state in a segment is `exp_avg` and `exp_avg_sq`, fp32."""

    def __init__(self, config: OptimizerConfig, kernels: Kernels, mesh: Mesh) -> None:
        self.config = config
        self._kernel = kernels.adamw_ if kernels.taken("adamw") == "triton" else None
        self._apex: torch.optim.Optimizer | None = None
        self.name = "Triton AdamW" if self._kernel else "torch fused AdamW"

    def prepare(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            segment.state[EXP_AVG] = torch.zeros_like(segment.master.data)
            segment.state[EXP_AVG_SQ] = torch.zeros_like(segment.master.data)
        if self._kernel is None and segments and segments[0].master.is_cuda and (fused_adam := _fused_adam()):
            self._apex = self._build_apex(fused_adam, segments)
            self.name = "apex FusedAdam"

    def _by_decay(self, segments: Iterable[Segment]) -> list[tuple[list[Segment], float]]:
        """(segments, weight decay): first those with decay (matrices), then those without."""
        return [
            ([segment for segment in segments if segment.bucket.decays == decays], weight_decay)
            for decays, weight_decay in ((True, self.config.weight_decay), (False, 0.0))
        ]

    def _build_apex(self, fused_adam: Any, segments: Sequence[Segment]) -> torch.optim.Optimizer:
        groups = [
            {"params": [segment.master for segment in part], "weight_decay": weight_decay}
            for part, weight_decay in self._by_decay(segments)
        ]
        config = self.config
        optimizer = fused_adam(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, adam_w_mode=True
        )
        for segment in segments:
            optimizer.state[segment.master] = {name: segment.state[name] for name in (EXP_AVG, EXP_AVG_SQ)}
        return optimizer

    def update(self, segments: Sequence[Segment], *, lr: float, gradient_scale: float, step: int) -> None:
        if self._kernel is not None:
            self._update_by_kernel(self._kernel, segments, lr, gradient_scale, step)
            return
        if gradient_scale != 1.0:
            for segment in segments:
                _gradient(segment).mul_(gradient_scale)
        if self._apex is not None:
            self._update_by_apex(self._apex, segments, lr, step)
        else:
            for part, weight_decay in self._by_decay(segments):
                self._update_by_torch(part, lr, weight_decay, step)
        for segment in segments:
            segment.write_back()

    def _update_by_kernel(
        self, kernel: Callable[..., Any], segments: Sequence[Segment], lr: float, gradient_scale: float, step: int
    ) -> None:
        """One launch per segment: scaled gradient, moments, master weights and rounded parameters in one pass."""
        config = self.config
        for part, weight_decay in self._by_decay(segments):
            for segment in part:
                kernel(
                    segment.master.detach(),
                    _gradient(segment),
                    segment.state[EXP_AVG],
                    segment.state[EXP_AVG_SQ],
                    lr=lr,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    eps=config.eps,
                    weight_decay=weight_decay,
                    step=step,
                    grad_scale=gradient_scale,
                    param_out=segment.bucket.owned if segment.separate_master else None,
                )

    def _update_by_torch(self, segments: Sequence[Segment], lr: float, weight_decay: float, step: int) -> None:
        """The kernel behind torch.optim.AdamW(fused=True), called directly as importing the class takes a second."""
        if not segments:
            return
        count = torch.full((), float(step), device=segments[0].master.device)  # no copy: that would stop the host
        torch._fused_adamw_(
            [segment.master for segment in segments],
            [_gradient(segment) for segment in segments],
            [segment.state[EXP_AVG] for segment in segments],
            [segment.state[EXP_AVG_SQ] for segment in segments],
            [],
            [count] * len(segments),
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
        )

    def _update_by_apex(
        self, optimizer: torch.optim.Optimizer, segments: Sequence[Segment], lr: float, step: int
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["step"] = lr, step - 1
        for segment in segments:
            segment.master.grad = segment.gradient
        optimizer.step()


def _gradient(segment: Segment) -> Tensor:
    assert segment.gradient is not None
    return segment.gradient
