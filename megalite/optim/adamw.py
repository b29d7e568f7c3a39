"""AdamW over this rank's flat shards, with fp32 master weights.

A `Segment` is the run of a bucket's elements that one rank updates. In fp32 its master weights *are* the bucket's
parameters; in bf16 they are a separate fp32 copy that is rounded into the bucket after each step. The element-wise
update itself is our Triton kernel where `kernels.adamw` takes it, else NVIDIA apex's `FusedAdam` where it imports on a
GPU, else torch's fused AdamW.
Source: Loshchilov and Hutter 2019 (decoupled weight decay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.kernels import Kernels
from megalite.parallel.zero import Bucket, StageBuckets
from megalite.placement import Box, range_boxes


@dataclass(frozen=True, eq=False)
class Segment:
    """What this rank updates of a bucket: master weights, reduced gradients, both moments; fp32, 1-D, of one length."""

    bucket: Bucket
    master: torch.nn.Parameter
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def span(self) -> slice:
        """The segment's elements of the bucket."""
        return self.bucket.updated

    @property
    def separate_master(self) -> bool:
        return self.bucket.dtype != torch.float32

    def write_back(self) -> None:
        """Round the master weights into the parameters, where they are a copy."""
        if self.separate_master:
            self.bucket.owned.copy_(self.master.detach())

    def pieces(self) -> Iterator[tuple[Box, slice]]:
        """What this segment holds of the global tensors: (box, where its elements lie in the segment), row-major.

        Boxes of which another replica is the owner are included: every holder needs them when loading.
        """
        for slot in self.bucket.slots:
            start, stop = max(slot.start, self.span.start), min(slot.stop, self.span.stop)
            if start >= stop:
                continue
            shape = tuple(slot.parameter.shape)
            for box in slot.parameter.placement.boxes:
                for part, first in range_boxes(box, shape, start - slot.start, stop - slot.start):
                    begin = slot.start + first - self.span.start
                    length = 1
                    for extent in part.size:
                        length *= extent
                    yield part, slice(begin, begin + length)


def _segment(bucket: Bucket) -> Segment:
    values = bucket.owned
    master = torch.nn.Parameter(values if values.dtype == torch.float32 else values.float())
    zeros = torch.zeros_like(master.data)
    return Segment(bucket, master, bucket.updated_gradients, zeros, zeros.clone())


def _fused_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam, if that build is what imports (the package index's `apex` is another project)."""
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
    except Exception:  # a foreign or half-built apex fails in many ways, all of which mean the same here
        return None
    return FusedAdam


class ShardedAdamW:
    """The optimizer of all stages on this rank. `step_count` is the number of updates made."""

    def __init__(self, stages: list[StageBuckets], config: OptimizerConfig, kernels: Kernels) -> None:
        self.stages, self.config = stages, config
        self.segments = [_segment(bucket) for stage in stages for bucket in stage.buckets]
        self.step_count = 0
        self._groups = [
            ([segment for segment in self.segments if segment.bucket.decays == decays], weight_decay)
            for decays, weight_decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self._kernel = kernels.adamw_ if kernels.taken("adamw") == "triton" else None
        on_gpu = self._kernel is None and bool(self.segments) and self.segments[0].master.is_cuda
        fused_adam = _fused_adam() if on_gpu else None
        self._apex = self._build_apex(fused_adam) if fused_adam is not None else None
        self.name = "Triton AdamW" if self._kernel else "apex FusedAdam" if self._apex else "torch fused AdamW"

    def _build_apex(self, fused_adam: Any) -> torch.optim.Optimizer:
        groups = [
            {"params": [segment.master for segment in segments], "weight_decay": weight_decay}
            for segments, weight_decay in self._groups
        ]
        config = self.config
        optimizer = fused_adam(
            groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, adam_w_mode=True
        )
        for segment in self.segments:
            optimizer.state[segment.master] = {"exp_avg": segment.exp_avg, "exp_avg_sq": segment.exp_avg_sq}
        return optimizer

    def set_step_count(self, steps: int) -> None:
        """Take the moments as they are now for those after `steps` updates."""
        self.step_count = steps

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's shards with `gradient_scale` times their gradients, then share the new parameters."""
        for stage in self.stages:
            stage.settle()
        self.step_count += 1
        if self._kernel is not None:
            self._update_by_kernel(self._kernel, lr, gradient_scale)
        else:
            self._update_by_library(lr, gradient_scale)
        for stage in self.stages:
            stage.gather_parameters()

    def _update_by_kernel(self, kernel: Callable[..., Any], lr: float, gradient_scale: float) -> None:
        """One launch a segment: scaled gradient, moments, master weights and rounded parameters in one pass."""
        config = self.config
        for segments, weight_decay in self._groups:
            for segment in segments:
                kernel(
                    segment.master.detach(),
                    segment.gradient,
                    segment.exp_avg,
                    segment.exp_avg_sq,
                    lr=lr,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    eps=config.eps,
                    weight_decay=weight_decay,
                    step=self.step_count,
                    grad_scale=gradient_scale,
                    param_out=segment.bucket.owned if segment.separate_master else None,
                )

    def _update_by_library(self, lr: float, gradient_scale: float) -> None:
        if gradient_scale != 1.0:
            for segment in self.segments:
                segment.gradient.mul_(gradient_scale)
        if self._apex is not None:
            self._update_by_apex(self._apex, lr)
        else:
            for segments, weight_decay in self._groups:
                self._update(segments, lr, weight_decay)
        for segment in self.segments:
            segment.write_back()

    def _update(self, segments: list[Segment], lr: float, weight_decay: float) -> None:
        """What torch.optim.AdamW(fused=True) calls; called here directly, since importing that class costs a second."""
        if not segments:
            return
        count = torch.tensor(float(self.step_count), device=segments[0].master.device)
        torch._fused_adamw_(
            [segment.master for segment in segments],
            [segment.gradient for segment in segments],
            [segment.exp_avg for segment in segments],
            [segment.exp_avg_sq for segment in segments],
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

    def _update_by_apex(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["step"] = lr, self.step_count - 1
        for segment in self.segments:
            segment.master.grad = segment.gradient
        optimizer.step()

    def restart(self) -> None:
        """Begin with the parameters as they are: they become the master weights, the moments zero."""
        for segment in self.segments:
            if segment.separate_master:
                segment.master.data.copy_(segment.bucket.owned)
            segment.exp_avg.zero_()
            segment.exp_avg_sq.zero_()
        self.set_step_count(0)
