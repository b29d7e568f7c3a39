"""What a step minimises: an object passed to the trainer, a function of [B, S] tensors that sees no group or rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.registry import look_up

Reads = Literal["loss", "logprobs", "values"]


def head_for(reads: Reads) -> str:
    """The head of a model whose objective reads this, as `megalite.model.sharded.ShardedModel` names it."""
    return "scalar" if reads == "values" else "vocabulary"


@dataclass(frozen=True)
class Outputs:
    """The last stage's outputs for an objective: the one that it `reads`, equal on all tensor ranks."""

    loss: Tensor | None = None
    """fp64 scalar: `scale` times the sum of the micro-batch's token losses, from the fused loss."""
    logprobs_BS: Tensor | None = None
    """fp32, differentiable: log-probability of each label, 0 where it is ignored."""
    values_BS: Tensor | None = None
    """fp32, differentiable: the scalar head's value at each position."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """The same with `change` applied to what is [B, S]."""
        logprobs_BS, values_BS = (x if x is None else change(x) for x in (self.logprobs_BS, self.values_BS))
        return Outputs(self.loss, logprobs_BS, values_BS)


class Objective(Protocol):
    """A sum over units (such as tokens or pairs) times one scale: 1 / the count of units in the global batch.

    The count is known before the first forward pass, so accumulation and layouts cannot disagree about it.

    Two more attributes are optional: `offset` is added to the reported mean, so that a loss can be computed as its
    excess over a constant without rounding it; `temperature` divides the logits before the log-probabilities that the
    objective reads.
    """

    @property
    def reads(self) -> Reads:
        """Which of `Outputs` it needs."""
        ...

    def units(self, batch: Batch) -> Tensor:
        """The number of units in the micro-batch, a scalar; summed over the global batch in float64."""
        ...

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(fp64 scalar: `scale` times the sum over the units, further such sums by name for the metrics).

        The names must be the same for every micro-batch. A metric is the sum of its values over the global batch.
        """
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the sums returned by `loss`, the same on every rank."""
        ...


def build_objective(config: Config) -> Objective:
    """The objective that `objective.kind` names: made by its `from_config(config)` if it has one, else without
    arguments."""
    kind = look_up("objective.kind", config.objective.kind)
    objective: Objective = kind.from_config(config) if hasattr(kind, "from_config") else kind()
    return objective
