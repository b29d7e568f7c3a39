"""One rank's share of the training step: its stages, its gradient buckets, its optimizer shard.

`Trainer` owns everything that a step changes and nothing else: data come in as micro-batches, numbers go out as a
`StepResult`; files, signals, logs and the order of the data are the loop's affair.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.batches import Batch
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.model.head import IGNORED
from megalite.optim.adamw import ShardedAdamW
from megalite.optim.norm import GradientNorm
from megalite.parallel.engine import Activation, Observer, PipelineEngine, StageForward, unobserved
from megalite.parallel.zero import StageBuckets
from megalite.placement import initialise_parameter, placed_parameters
from megalite.schedule.lowering import lower
from megalite.schedule.schedules import build_schedule, forward_only, place_stages

Batches = Sequence[Batch | None]
"""The micro-batches of a step on one rank; None on ranks that need neither tokens nor labels."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step. `accepted` is False when loss or gradient norm was not finite: no update then.

    `loss` is the mean over the step's valid tokens, `grad_norm` the global norm before clipping, `flags` the sum over
    the ranks of what each put in (a request to stop, say).
    """

    loss: float
    grad_norm: float
    accepted: bool
    flags: float


class Trainer:
    """Model, buckets and optimizer of this rank. Parameters are uninitialised until `initialise` or a checkpoint."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels) -> None:
        self.config, self.mesh = config, mesh
        self.owners = place_stages(config.parallel.schedule, mesh.pp, config.parallel.virtual_stages)
        self.stage_count = len(self.owners)
        self.dtype = DTYPES[config.train.precision]
        self.stages: dict[int, Stage] = {}
        for stage in (stage for stage, owner in enumerate(self.owners) if owner == mesh.index("pp")):
            self.stages[stage] = Stage(
                config.model,
                mesh,
                kernels,
                stage=stage,
                owners=self.owners,
                embedding=self.stages[0].embedding if 0 in self.stages else None,
                sequence=bool(config.parallel.sequence),
                dtype=self.dtype,
                recompute=config.train.recompute,
                fp8=config.train.fp8,
                z_loss=config.train.z_loss,
            )
        aliases = [p for stage in self.stages.values() for p in placed_parameters(stage) if p.tied_to is not None]
        self.buckets = {
            number: StageBuckets(stage, mesh, zero=config.parallel.zero, aliases=aliases)
            for number, stage in self.stages.items()
        }
        self.optimizer = ShardedAdamW(list(self.buckets.values()), config.optimizer, kernels)
        self.norm = GradientNorm(list(self.buckets.values()), mesh.rank, kernels)
        self.observe: Observer = unobserved
        self._engines: dict[tuple[int, bool], PipelineEngine] = {}
        self._data_group = mesh.group("dp", "cp")
        self._world = mesh.world

    @property
    def last_stage(self) -> Stage | None:
        return self.stages.get(self.stage_count - 1)

    @property
    def needs_batches(self) -> bool:
        """Whether this rank reads tokens or labels; the ranks in the middle of the pipeline need neither."""
        return 0 in self.stages or self.last_stage is not None

    def initialise(self) -> None:
        """Fill the model with the initial weights of `run.seed`: the same global tensors in every layout."""
        for buckets in self.buckets.values():
            buckets.fill(functools.partial(initialise_parameter, seed=self.config.run.seed))
        self.optimizer.restart()

    def settle(self) -> None:
        """Wait for parameters that are still being gathered, before weights or their masters are read or overwritten
        other than by a step."""
        for buckets in self.buckets.values():
            buckets.settle()

    def _engine(self, micro_batches: int, train: bool) -> PipelineEngine:
        key = (micro_batches, train)
        if key not in self._engines:
            parallel, train_config, ranks = self.config.parallel, self.config.train, self.mesh.pp
            if train:
                plan = build_schedule(parallel.schedule, ranks, micro_batches, parallel.virtual_stages)
            else:
                plan = forward_only(self.owners, micro_batches)
            lowered = lower(plan, tied=self.config.model.tie_embeddings)
            split = next(iter(self.stages.values())).region.split
            shape = (train_config.seq_length // split, train_config.micro_batch_size, self.config.model.hidden_size)
            activation = Activation(shape, self.dtype, self.mesh.device)
            self._engines[key] = PipelineEngine(lowered[self.mesh.index("pp")], self.owners, self.mesh, activation)
        return self._engines[key]

    def _forward(self, batches: Batches, scale: Tensor | float) -> StageForward:
        def forward(number: int, micro: int, hidden: Tensor | None) -> Tensor:
            stage, batch = self.stages[number], batches[micro]
            own = (batch.positions_BS, batch.documents_BS) if batch is not None else (None, None)
            positions = stage.positions(self.config.train.seq_length, 0, *own)
            if hidden is None:
                assert batch is not None
                hidden = batch.tokens_BS
            hidden = stage(hidden, positions)
            if not stage.last:
                return hidden
            assert batch is not None
            return stage.loss(hidden, batch.labels_BS, scale)

        return forward

    def _valid_tokens(self, batches: Batches) -> Tensor:
        """Labels that count, over the global batch: fp64 scalar, never fetched to the host. 0 but on the last stage."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.last_stage is not None:
            for batch in batches:
                if batch is not None:
                    total += (batch.labels_BS != IGNORED).sum()
            self._data_group.all_reduce(total).wait()
        return total

    def _agree(self, *numbers: Tensor | float) -> list[float]:
        """Sum a few numbers over all ranks, in float64: the one message of a step that everyone waits for."""
        device = self.mesh.device
        packed = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
        self._world.all_reduce(packed).wait()
        return packed.tolist()

    def _loss_share(self, losses: dict[int, Tensor]) -> Tensor | float:
        """This rank's part of the global loss: tensor ranks of the last stage hold the same, so one of them counts.

        The others add 0 times theirs: if it is not finite, on one of them alone, all ranks hear of it.
        """
        if not losses:
            return 0.0
        share = torch.stack([losses[micro] for micro in sorted(losses)]).sum()
        return share if self.mesh.index("tp") == 0 else 0.0 * share

    def accumulate(self, batches: Batches) -> Tensor | float:
        """Forward and backward of all micro-batches, gradients reduced; returns this rank's part of the loss."""
        valid = self._valid_tokens(batches)
        for buckets in self.buckets.values():
            buckets.begin(len(batches))
        engine, forward = self._engine(len(batches), train=True), self._forward(batches, 1.0 / valid.clamp(min=1))
        return self._loss_share(engine.run(forward, self.buckets, self.observe))

    def step(self, batches: Batches, lr: float, flag: float = 0.0) -> StepResult:
        """One optimizer step over this rank's micro-batches; every rank calls it with as many.

        All ranks agree on loss, norm and `flag` before anything is updated, so that either all of them take the step
        or none does.
        """
        share = self.accumulate(batches)
        square, loss, flags = self._agree(self.norm.local_square_sum(), share, flag)
        grad_norm = float(np.float32(math.sqrt(square))) if square >= 0 else math.nan
        accepted = math.isfinite(loss) and math.isfinite(grad_norm)
        if accepted:
            limit = self.config.optimizer.clip_grad
            scale = min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0
            self.optimizer.step(lr, scale)
        return StepResult(loss, grad_norm, accepted, flags)

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> tuple[float, int]:
        """(sum of the token losses, count of valid tokens) over this call's micro-batches of all ranks."""
        engine = self._engine(len(batches), train=False)
        share = self._loss_share(engine.run(self._forward(batches, 1.0)))
        valid = self._valid_tokens(batches)
        counts_once = self.last_stage is not None and self.mesh.rank == self.mesh.rank_at(dp=0, cp=0, tp=0)
        loss, count = self._agree(share, valid if counts_once else 0.0)
        return loss, int(count)
