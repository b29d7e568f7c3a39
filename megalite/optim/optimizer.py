"""The optimizer of a rank: which rule updates its segments, and the order of a step.

A rule (AdamW, Muon, …) sees segments, not stages, and keeps its state in them under names of its own. It is made and
called by all ranks alike, so it may communicate over the mesh, as Muon does for whole matrices. Checkpoints, resharding
and resume read the names from the segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.optim.at_rest import StateSums
from megalite.optim.shard import Segment
from megalite.parallel.zero import StageBuckets, gather_parameters
from megalite.registry import look_up


class Rule(Protocol):
    """How some segments are updated; made as `kind(OptimizerConfig, Kernels, Mesh)`."""

    name: str
    """For the start-up log."""

    def prepare(self, segments: Sequence[Segment]) -> None:
        """Allocate the state of these segments, as zeros."""
        ...

    def update(self, segments: Sequence[Segment], *, lr: float, gradient_scale: float, step: int) -> None:
        """Update the master weights (and round them into the parameters) with `gradient_scale` times the gradients;
        `step` counts from 1."""
        ...


def build_rule(config: OptimizerConfig, kernels: Kernels, mesh: Mesh) -> Rule:
    """The rule that the configuration names."""
    return look_up("optimizer.kind", config.kind)(config, kernels, mesh)


class Optimizer:
    """All updates of this rank. `step_count` is the number of updates made. With `watched`, `damage` says whether
    something else than an update has changed the shards."""

    def __init__(
        self, stages: Sequence[StageBuckets], segments: Sequence[Segment], rule: Rule, *, watched: bool = False
    ) -> None:
        self.stages, self.rule = stages, rule
        self.segments = [segment for segment in segments if segment.gradient is not None]
        self.step_count = 0
        rule.prepare(self.segments)
        self._at_rest = StateSums(self.segments) if watched else None

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of all state tensors, sorted."""
        return tuple(sorted({name for segment in self.segments for name in segment.state}))

    @property
    def watched(self) -> bool:
        return self._at_rest is not None

    def set_step_count(self, steps: int) -> None:
        """Declare that the state is the one after `steps` updates."""
        self.step_count = steps
        if self._at_rest is not None:
            self._at_rest.forget()

    @torch.no_grad()
    def damage(self) -> Tensor | float:
        """The number of master weights and states that are not what the last update wrote: fp64 scalar."""
        if self._at_rest is None:
            return 0.0
        for stage in self.stages:
            stage.wait_for_all_gather()
        return self._at_rest.changed()

    @torch.no_grad()
    def damaged(self) -> list[str]:
        """Their names."""
        return [] if self._at_rest is None else self._at_rest.names()

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's shards with `gradient_scale` times their gradients, then all-gather the parameters."""
        for stage in self.stages:
            stage.wait_for_all_gather()
        self.step_count += 1
        self.rule.update(self.segments, lr=lr, gradient_scale=gradient_scale, step=self.step_count)
        if self._at_rest is not None:
            self._at_rest.remember()
        gather_parameters(self.stages)

    @torch.no_grad()
    def restart(self) -> None:
        """Start from the current parameters: copy them to the master weights and zero the state."""
        for segment in self.segments:
            segment.take_parameters()
            for tensor in segment.state.values():
                tensor.zero_()
        self.set_step_count(0)
