"""One rank's share of a training step: its model, its optimizer shard, and the sums that all ranks agree on.

`Trainer` owns exactly what a step changes: micro-batches go in, a `StepResult` comes out. Files, signals, logs and data
order belong to the loop.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.cuda_graph import GraphRecorder, recorder_for
from megalite.data.batch import Batch
from megalite.kernels import Kernels
from megalite.mesh import Group, Mesh, Work
from megalite.model.balance import expert_metrics
from megalite.model.decoder import Stage
from megalite.model.sharded import MicroBatches, ShardedModel
from megalite.objective import Objective, Outputs, build_objective, head_for
from megalite.objective.next_token import NEXT_TOKEN
from megalite.optim.grad_norm import GradientNorm
from megalite.optim.optimizer import Optimizer, build_rule
from megalite.parallel.engine import Observer, unobserved
from megalite.train.step_graph import StepGraph


@dataclass(frozen=True)
class StepResult:
    """The result of a step, identical on all ranks. `accepted` is False if loss or gradient norm was not finite; then
    nothing was updated.

    `loss` is the objective's mean over the step's `units` (counted tokens, or pairs); with no units it is meaningless,
    and nothing was updated. `grad_norm` is the global norm before clipping, `flags` the sum of the ranks' `flag`
    arguments (such as a request to stop), `metrics` the objective's own sums over the global batch, and those of the
    experts' load.
    """

    loss: float
    grad_norm: float
    accepted: bool
    flags: float
    units: float = math.nan
    metrics: dict[str, float] = field(default_factory=dict)


class Damaged(Exception):
    """Master weights or optimizer states have changed between two updates, and nothing of the step was updated.

    Raised by all ranks. `names` are the tensors that have changed on each rank.
    """

    def __init__(self, names: list[list[str]]) -> None:
        self.names = names
        hurt = [f"rank {rank}: {what[0]}" for rank, what in enumerate(names) if what]
        super().__init__(f"changed between two updates: {'; '.join(hurt)}")

    @property
    def ranks(self) -> list[int]:
        return [rank for rank, what in enumerate(self.names) if what]


@dataclass(frozen=True)
class _Shares:
    """One rank's terms of the sums over all ranks."""

    loss: Tensor | float
    units: Tensor | float
    metrics: dict[str, Tensor | float]
    loads: tuple[Tensor, ...] = ()
    """Of `Balance.collect`."""


class _Count:
    """The units of the global batch on their way: all ranks start to sum them, and wait where a loss is divided.

    The sum is over the world. The group of the data-parallel ranks may still be gathering the parameters of the update
    before, and on a GPU the operations of a group run one after the other.
    """

    def __init__(self, own: Tensor, world: Group) -> None:
        """`own` is this rank's term."""
        self._total = own.clone()
        self._work: Work | None = world.all_reduce(self._total)
        self._scale: Tensor | None = None

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    @property
    def scale(self) -> Tensor:
        """1 / units: fp64 scalar."""
        if self._scale is None:
            self.wait()
            self._scale = 1.0 / self._total.clamp(min=1)
        return self._scale


class Trainer(ShardedModel):
    """A model with its optimizer.

    `objective` is what a step minimises unless it is passed another; the default is the configuration's. An objective
    that reads values gets a scalar head.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        kernels: Kernels,
        *,
        prefix: str = "",
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective or build_objective(config)
        super().__init__(config, mesh, kernels, head=head_for(self.objective.reads), prefix=prefix)
        rule = build_rule(config.optimizer, kernels, mesh)
        watched = config.recovery.replica_check_interval > 0
        self.optimizer = Optimizer(list(self.buckets.values()), self.segments, rule, watched=watched)
        self.norm = self.make_norm()
        self.observe: Observer = unobserved
        self._world = mesh.world
        self.graph: StepGraph | None = None
        if config.train.cuda_graph:
            self.graph = self.make_graph(recorder_for(mesh.device, "train.cuda_graph = true"))

    def make_norm(self) -> GradientNorm:
        return GradientNorm(list(self.buckets.values()), self.mesh.rank, self.kernels)

    def make_graph(self, recorder: GraphRecorder) -> StepGraph:
        """Forward and backward passes of a step of `self.objective`, to be recorded and replayed."""

        def accumulate(batches: MicroBatches, shape: tuple[int, int] | None) -> _Shares:
            with self.mesh.waits_unobserved():
                return self._sum(batches, self.objective, shape, train=True)

        def held() -> list[Tensor]:
            buckets = [bucket for stage in self.buckets.values() for bucket in stage.buckets]
            gradients = [bucket.gradients for bucket in buckets if bucket.gradients is not None]
            return [*(bucket.parameters for bucket in buckets), *gradients]

        return StepGraph(accumulate, self.wait_for_all_gather, held, recorder)

    def initialise(self, trained: bool | None = None) -> None:
        super().initialise(trained)
        self.optimizer.restart()

    def initialise_before(self, source: str) -> None:
        """Give initial values to what a model loaded from `source` may lack; to everything if there is no source."""
        if not source or (self.adapter is None and self.fresh_shapes()):
            self.initialise()
        elif self.adapter is not None:
            self.initialise(trained=True)  # the base is read whole

    def _own_units(self, batches: MicroBatches, objective: Objective) -> Tensor:
        """This rank's term of the global batch's units: fp64 scalar, never copied to the host.

        Ranks that hold the same samples must not count them twice: of the last stage's, the first tensor rank and the
        first rank of a sequence do.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.last_stage is not None and self.mesh.index("tp") == 0 and self.context.group.index == 0:
            for batch in batches:
                if batch is not None:
                    total = total + objective.units(batch)
        return total

    def _agree(self, *numbers: Tensor | float) -> list[float]:
        """Sum a few numbers over all ranks, in float64: the one message of a step that everyone waits for."""
        packed = torch.zeros(len(numbers), dtype=torch.float64, device=self.mesh.device)
        for place, number in zip(packed, numbers):
            if isinstance(number, Tensor):
                place.copy_(number)
            else:  # by a kernel: a number that is made a tensor and copied to a GPU would stop the host once more
                place.fill_(number)
        self._world.all_reduce(packed).wait()
        return packed.tolist()

    def _share(self, losses: dict[int, Tensor], objective: Objective) -> Tensor | float:
        """This rank's term of a global sum: tensor ranks of the last stage hold the same value, so one of them counts.
        So do context ranks, unless each has the fused loss of its own tokens.

        The others add 0 times theirs, so that a non-finite value on any one of them reaches all ranks.
        """
        if not losses:
            return 0.0
        share = self._total([losses[micro] for micro in sorted(losses)])
        counts = self.mesh.index("tp") == 0 and (objective.reads == "loss" or self.context.group.index == 0)
        return share if counts else 0.0 * share

    def _total(self, losses: list[Tensor]) -> Tensor:
        """The sum of fp64 scalars, one of each micro-batch."""
        return torch.stack(losses).sum()

    def _sum(
        self, batches: MicroBatches, objective: Objective, shape: tuple[int, int] | None = None, *, train: bool
    ) -> _Shares:
        """Run all micro-batches, with backward if `train`: this rank's terms of the loss, the units and the metrics."""
        own_units = self._own_units(batches, objective)
        count = _Count(own_units, self._world)
        sums: dict[str, dict[int, Tensor]] = {name: {} for name in objective.metrics}

        def finish(stage: Stage, hidden: Tensor, batch: Batch, micro: int) -> Tensor:
            outputs = read_outputs(objective, stage, hidden, batch, count.scale)
            if self.context.size > 1 and objective.reads != "loss":  # what is made of whole sequences need not be a sum
                batch = cast(Batch, batches[micro])
                outputs = outputs.map(functools.partial(self.context.gather, length=batch.labels_BS.shape[1]))
            loss, named = objective.loss(outputs, batch, count.scale)
            for name, value in named.items():
                sums[name][micro] = value.detach().double()
            return loss

        observe = self.observe if train and self.graph is None else unobserved  # a recorded operation has no time
        losses = self.run(batches, finish, shape=shape, train=train, observe=observe)
        count.wait()  # on ranks without the last stage
        metrics = {name: self._share(values, objective) for name, values in sorted(sums.items())}
        loads = self.balance.collect(self.config.model.layers) if train and self.config.model.experts else ()
        return _Shares(self._share(losses, objective), own_units, metrics, loads)

    def accumulate(
        self, batches: MicroBatches, objective: Objective | None = None, shape: tuple[int, int] | None = None
    ) -> _Shares:
        """Forward and backward of all micro-batches, gradients reduced; returns this rank's part of the sums.

        `shape` is (B, S) of a micro-batch where it is not the configuration's.
        """
        if self.graph is not None and objective is None:
            shares: _Shares = self.graph(batches, shape)
            return shares
        return self._sum(batches, objective or self.objective, shape, train=True)

    def step(
        self,
        batches: MicroBatches,
        lr: float,
        flag: float = 0.0,
        objective: Objective | None = None,
        shape: tuple[int, int] | None = None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; every rank must pass the same number.

        All ranks agree on loss, norm and `flag` before anything is updated, so either all of them update or none does.
        Raises `Damaged` on all of them if a rank's optimizer state is not what the last update wrote.
        """
        own = self.accumulate(batches, objective, shape)
        numbers = (self.norm.local_square_sum(), own.loss, flag, own.units, self.optimizer.damage())
        square, loss, flags, units, damage, *sums = self._agree(*numbers, *own.metrics.values(), *own.loads)
        if damage and self.optimizer.watched:
            raise Damaged(self._world.gather_json(self.optimizer.damaged(), self.mesh.device))
        metrics = dict(zip(own.metrics, sums)) | expert_metrics(sums[len(own.metrics) :])
        loss += getattr(objective or self.objective, "offset", 0.0)
        grad_norm = float(np.float32(math.sqrt(square))) if square >= 0 else math.nan
        accepted = math.isfinite(loss) and math.isfinite(grad_norm)
        if accepted and units > 0:
            limit = self.config.optimizer.clip_grad
            scale = min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0
            self.optimizer.step(lr, scale)
            if self.adapter is None:  # beside one, the routers are frozen too
                self.balance.update()
        return StepResult(loss, grad_norm, accepted, flags, units, metrics)

    def measure(self, batches: MicroBatches) -> tuple[float, int, dict[str, float]]:
        """The objective without training: (its mean over these micro-batches of all ranks, units, metrics)."""
        own = self._sum(batches, self.objective, train=False)
        loss, units, *sums = self._agree(own.loss, own.units, *own.metrics.values())
        return loss + getattr(self.objective, "offset", 0.0), int(units), dict(zip(own.metrics, sums))

    def evaluate(self, batches: MicroBatches, shape: tuple[int, int] | None = None) -> tuple[float, int]:
        """(sum of the token losses, count of valid tokens) over this call's micro-batches of all ranks."""
        losses = self.run(
            batches, lambda stage, hidden, batch, _: stage.loss(hidden, batch.labels_BS, 1.0), shape=shape
        )
        share = self._share(losses, NEXT_TOKEN)
        loss, count = self._agree(share, self._own_units(batches, NEXT_TOKEN))
        return loss, int(count)


def read_outputs(objective: Objective, stage: Stage, hidden: Tensor, batch: Batch, scale: Tensor | float) -> Outputs:
    """The outputs of the last stage that the objective reads."""
    if objective.reads == "loss":
        return Outputs(loss=stage.loss(hidden, batch.labels_BS, scale))
    if objective.reads == "logprobs":
        temperature = getattr(objective, "temperature", 1.0)
        return Outputs(logprobs_BS=stage.logprobs(hidden, batch.labels_BS, temperature))
    return Outputs(values_BS=stage.values(hidden))
