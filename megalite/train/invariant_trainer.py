"""Training whose bits do not depend on the number of ranks (`train.invariant`, docs/invariance.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from megalite.config import Config
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.build import Build
from megalite.model.invariant_build import InvariantBuild
from megalite.model.sharded import Finish, MicroBatches
from megalite.optim.exact_norm import ExactNorm
from megalite.parallel.engine import Observer, unobserved
from megalite.parallel.virtual_parts import PartBuckets, tree_sum
from megalite.train.trainer import Trainer


class InvariantTrainer(Trainer):
    """A trainer of `train.invariant` virtual parts, of the model and of the batch.

    Its mesh must have tree groups (`megalite.parallel.virtual_parts.tree_groups`). A step's micro-batches are those of
    this rank's parts of the batch, one part after the other and equally many of each.
    """

    make_buckets = PartBuckets

    @property
    def make_build(self) -> Callable[..., Build]:
        return functools.partial(InvariantBuild, parts=self.config.train.invariant)

    @property
    def own_parts(self) -> int:
        """Parts of the batch of this rank."""
        return self.config.train.invariant // self.mesh.samples_size

    def make_norm(self) -> ExactNorm:
        return ExactNorm(list(self.buckets.values()), self.mesh, self.kernels)

    def run(
        self,
        batches: MicroBatches,
        finish: Finish,
        *,
        shape: tuple[int, int] | None = None,
        train: bool = False,
        observe: Observer = unobserved,
    ) -> dict[int, Tensor]:
        """As `ShardedModel.run`; in training, the pipeline is filled and emptied once for each part."""
        if not train:
            return super().run(batches, finish, shape=shape)
        for buckets in self.buckets.values():
            assert isinstance(buckets, PartBuckets)
            buckets.begin_step(self.own_parts)
        each = len(batches) // self.own_parts
        outputs: dict[int, Tensor] = {}
        for first in range(0, len(batches), each):

            def finish_in_part(*arguments: object, first: int = first) -> Tensor:
                stage, hidden, batch, micro = arguments
                return finish(stage, hidden, batch, first + micro)  # type: ignore[arg-type, operator]

            part = batches[first : first + each]
            results = super().run(part, finish_in_part, shape=shape, train=True, observe=observe)
            outputs |= {first + micro: output for micro, output in results.items()}
        return outputs

    def _total(self, losses: list[Tensor]) -> Tensor:
        each = -(-len(losses) // self.own_parts)
        return tree_sum([torch.stack(losses[i : i + each]).sum() for i in range(0, len(losses), each)])


def build_trainer(config: Config, mesh: Mesh, kernels: Kernels) -> Trainer:
    """The trainer that `train.invariant` asks for."""
    return (InvariantTrainer if config.train.invariant else Trainer)(config, mesh, kernels)
