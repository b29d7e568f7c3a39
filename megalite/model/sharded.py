"""This rank's share of one model: its stages, gradient buckets and pipeline engines.

Trained or frozen, with or without ZeRO, with a vocabulary or a scalar head: the trainer, evaluation, generation, a
frozen reference and a reward model all use this class.

S sequence, B micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.adapter import build_adapter
from megalite.model.attention import Positions
from megalite.model.balance import Balance
from megalite.model.batch_invariant_build import BatchInvariantBuild
from megalite.model.build import Build
from megalite.model.decoder import SCORE, Stage
from megalite.model.init import initialise_parameter
from megalite.model.router import Router
from megalite.model.shapes import model_shapes
from megalite.optim.shard import Segment, segments_of
from megalite.parallel.context import PADDING, ContextRegion
from megalite.parallel.engine import Activation, Observer, PipelineEngine, unobserved
from megalite.parallel.turns import Turns
from megalite.parallel.zero import StageBuckets, gather_parameters
from megalite.placement import PlacedParameter, placed_parameters
from megalite.schedule.lowering import lower
from megalite.schedule.schedules import build_schedule, forward_only, in_pairs, place_stages

MicroBatches = Sequence[Batch | None]
"""The micro-batches of a step on one rank; None on ranks that need neither tokens nor labels."""

Finish = Callable[[Stage, Tensor, Batch, int], Tensor]
"""(last stage, its hidden [s, B, H] before the norm, part of the micro-batch, its number) -> the pipeline's output:
in training the loss (fp64 scalar)."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ShardedModel:
    """The stages of one model on this rank. Parameters are uninitialised until `initialise` or a checkpoint.

    `head` is `vocabulary` or `scalar`; `prefix` is prepended to all global names, to distinguish two models in one
    checkpoint. Unless `trained`, the model has neither gradients nor optimizer state; with an adapter, only the
    adapter's parameters are trained, and a scalar head.

    `base` says where the frozen weights beside an adapter came from, once they are loaded: checkpoints then leave them
    out.
    """

    base: Mapping[str, str] | None = None

    make_buckets: type[StageBuckets] = StageBuckets

    @property
    def make_build(self) -> Callable[..., Build]:
        """What makes the build context of the stages."""
        return BatchInvariantBuild if self.config.train.batch_invariant else Build

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        kernels: Kernels,
        *,
        head: str = "vocabulary",
        prefix: str = "",
        trained: bool = True,
    ) -> None:
        self.config, self.mesh, self.kernels = config, mesh, kernels
        adapter = build_adapter(config)
        self.owners = place_stages(config.parallel.schedule, mesh.pp, config.parallel.virtual_stages)
        self.dtype = DTYPES[config.train.precision]
        self.head, self.prefix, self.adapter = head, prefix, adapter
        split = mesh.tp if config.parallel.sequence else 1
        self.context = ContextRegion.of(mesh, config.parallel.context_mode, split)
        self.tied = config.model.tie_embeddings and head == "vocabulary"
        self.turns = Turns() if config.parallel.two_batch_overlap else None
        self.stages: dict[int, Stage] = {}
        for number in (number for number, owner in enumerate(self.owners) if owner == mesh.index("pp")):
            self.stages[number] = Stage(
                config.model,
                mesh,
                kernels,
                stage=number,
                owners=self.owners,
                embedding=self.stages[0].embedding if 0 in self.stages else None,
                sequence=bool(config.parallel.sequence),
                pieces=config.parallel.overlap_splits(gpu=mesh.device.type == "cuda"),
                keeps=config.parallel.keep_gathered,
                turns=self.turns,
                dtype=self.dtype,
                recompute=config.train.recompute,
                fp8=config.train.fp8,
                z_loss=config.train.z_loss,
                head=head,
                prefix=prefix,
                adapter=adapter,
                context=self.context,
                make_build=self.make_build,
            )
        parameters = [parameter for stage in self.stages.values() for parameter in placed_parameters(stage)]
        for parameter in parameters:
            if not trained or (adapter is not None and not self._beside_base(parameter)):
                parameter.requires_grad_(False)
        aliases = [parameter for parameter in parameters if parameter.tied_to is not None]
        self.buckets = {
            number: self.make_buckets(stage, mesh, zero=config.parallel.zero, aliases=aliases)
            for number, stage in self.stages.items()
        }
        self.segments: list[Segment] = segments_of(self.buckets.values())
        modules = (module for stage in self.stages.values() for module in stage.modules())
        self.balance = Balance([module for module in modules if isinstance(module, Router)], mesh)
        self._inference_stages: dict[int, Stage] | None = None
        self._engines: dict[tuple[int, tuple[int, int], bool], PipelineEngine] = {}

    def _beside_base(self, parameter: PlacedParameter) -> bool:
        """Whether a parameter is trained although the weights are frozen: an adapter's, or the head of a scorer, which
        is new to its base."""
        return parameter.placement.role in ("adapter", *(["output"] if self.head == "scalar" else []))

    @property
    def stage_count(self) -> int:
        return len(self.owners)

    @property
    def last_stage(self) -> Stage | None:
        return self.stages.get(self.stage_count - 1)

    @property
    def needs_batches(self) -> bool:
        """Whether this rank reads tokens or labels; ranks in the middle of the pipeline need neither."""
        return 0 in self.stages or self.last_stage is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S) of a micro-batch, from the configuration."""
        return self.config.train.micro_batch_size, self.config.train.seq_length

    # Parameters

    @property
    def models(self) -> Sequence[ShardedModel]:
        """This model alone; see `megalite.checkpoint.state.Checkpointable`."""
        return (self,)

    @property
    def saved_segments(self) -> Sequence[Segment]:
        """Those that checkpoints hold: all, or without the weights of `base`."""
        return self.segments if self.base is None else [part for part in self.segments if part.gradient is not None]

    def fill(self, write: Callable[[PlacedParameter], None], trained: bool | None = None) -> None:
        """Call `write` for every parameter (or those alone that are trained, or not), which it must overwrite; under
        ZeRO-3 one layer at a time is unsharded."""
        for buckets in self.buckets.values():
            buckets.fill(write, trained)

    def initialise(self, trained: bool | None = None) -> None:
        """Fill the model (or what is trained alone, or not) with the initial weights of `run.seed`: the same global
        tensors in every layout."""
        self.fill(functools.partial(initialise_parameter, seed=self.config.run.seed), trained)

    @torch.no_grad()
    def copy_from(self, other: ShardedModel) -> None:
        """Copy the weights of a model of the same layout and shapes."""
        for number, buckets in self.buckets.items():
            with other.buckets[number].whole():
                theirs = dict(other.stages[number].named_parameters())
                names = {id(parameter): name for name, parameter in self.stages[number].named_parameters()}

                def write(
                    parameter: PlacedParameter, theirs: Mapping[str, Tensor] = theirs, names: Mapping[int, str] = names
                ) -> None:
                    parameter.copy_(theirs[names[id(parameter)]])

                buckets.fill(write)

    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and global shapes of all tensors of the whole model."""
        return model_shapes(self.config.model, head=self.head, prefix=self.prefix, adapter=self.adapter)

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        """The subset that an adapter leaves as it is."""
        plain = model_shapes(self.config.model, head=self.head, prefix=self.prefix)
        return {name: shape for name, shape in plain.items() if not name.endswith(SCORE)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and global shapes of the tensors that checkpoints hold: all, or without those of `base`."""
        base = {} if self.base is None else self.base_shapes()
        return {name: shape for name, shape in self.all_shapes().items() if name not in base}

    def fresh_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that another run's checkpoint may lack: an adapter's, another kind of head, or what has been
        learnt about the load of experts."""
        plain = model_shapes(
            dataclasses.replace(self.config.model, tie_embeddings=False, router_bias_rate=0.0, aux_loss=0.0)
        )
        return {name: shape for name, shape in self.all_shapes().items() if name.removeprefix(self.prefix) not in plain}

    def wait_for_all_gather(self) -> None:
        """Wait for parameters that are still being gathered; needed before weights or master weights are read or
        written outside a step."""
        for buckets in self.buckets.values():
            buckets.wait_for_all_gather()

    @torch.no_grad()
    def share(self) -> None:
        """Round new master weights of the segments into the parameters and all-gather them."""
        for segment in self.segments:
            segment.write_back()
        gather_parameters(self.buckets.values())
        self.wait_for_all_gather()

    # Computation

    def _engine(self, micro_batches: int, shape: tuple[int, int], train: bool) -> PipelineEngine:
        key = (micro_batches, shape, train)
        if key not in self._engines:
            parallel, (batch, length) = self.config.parallel, shape
            if train:
                plan = build_schedule(parallel.schedule, self.mesh.pp, micro_batches, parallel.virtual_stages)
            else:
                plan = forward_only(self.owners, micro_batches)
            if parallel.two_batch_overlap:
                plan = in_pairs(plan)
            lowered = lower(plan, tied=self.tied)
            context = self.context
            hidden = (context.part_length(length) // context.split, batch, self.config.model.hidden_size)
            activation = Activation(hidden, self.dtype, self.mesh.device)
            operations = lowered[self.mesh.index("pp")]
            self._engines[key] = PipelineEngine(operations, self.owners, self.mesh, activation, self.turns)
        return self._engines[key]

    def run(
        self,
        batches: MicroBatches,
        finish: Finish,
        *,
        shape: tuple[int, int] | None = None,
        train: bool = False,
        observe: Observer = unobserved,
    ) -> dict[int, Tensor]:
        """Run micro-batches of `shape` (B, S) through the pipeline; returns the results of `finish` by micro-batch, on
        the rank of the last stage. With `train`, also runs backward and reduces gradients.

        Under context parallelism, `finish` gets this rank's part of the micro-batch."""
        shape = shape or self.shape

        def forward(number: int, micro: int, hidden: Tensor | None) -> Tensor:
            stage, whole = self.stages[number], batches[micro]
            part = None if whole is None else self.context.cut(whole)
            if hidden is None:
                assert part is not None
                hidden = part.tokens_BS
            hidden = stage(hidden, self._positions(stage, shape[1], whole, part))
            if not stage.last:
                return hidden
            assert part is not None
            return finish(stage, hidden, part, micro)

        engine = self._engine(len(batches), shape, train)
        if train:
            self.balance.begin(len(batches) * math.prod(shape) * self.mesh.samples_size)
            for buckets in self.buckets.values():
                buckets.begin(len(batches))
            return engine.run(forward, self.buckets, observe)
        with torch.no_grad():
            return engine.run(forward, observe=observe)

    def _positions(self, stage: Stage, length: int, whole: Batch | None, part: Batch | None) -> Positions:
        """Positions of this rank's rows, with the documents of all that attention sees."""
        positions = None if part is None else part.positions_BS
        documents = None if whole is None else whole.documents_BS
        if self.context.size == 1:
            return stage.positions(length, 0, positions, documents)
        documents = None if documents is None else self.context.pad(documents, PADDING)
        return stage.positions(length, 0, positions, documents, self.context.rows(length))

    def score(
        self, batches: MicroBatches, *, shape: tuple[int, int] | None = None, temperature: float = 1.0
    ) -> list[Tensor]:
        """For each micro-batch [2, B, S] (fp32): log-probabilities of the labels, and 1 where the label is the argmax.
        On the rank of the last stage; an empty list on the others."""
        length = (shape or self.shape)[1]

        def finish(stage: Stage, hidden: Tensor, batch: Batch, micro: int) -> Tensor:
            return self.context.gather(stage.label_stats(hidden, batch.labels_BS, temperature), length)

        outputs = self.run(batches, finish, shape=shape)
        return [outputs[micro] for micro in sorted(outputs)]

    def values(self, batches: MicroBatches, *, shape: tuple[int, int] | None = None) -> list[Tensor]:
        """The same for a scalar head: [B, S] (fp32) of each micro-batch."""
        length = (shape or self.shape)[1]

        def finish(stage: Stage, hidden: Tensor, batch: Batch, micro: int) -> Tensor:
            return self.context.gather(stage.values(hidden), length)

        outputs = self.run(batches, finish, shape=shape)
        return [outputs[micro] for micro in sorted(outputs)]

    def without_adapter(self) -> ShardedModel:
        """The base of an adapter: a view of the same weights that computes without it."""
        view = copy.copy(self)
        view.adapter = None
        view.stages = {number: stage.without_adapter() for number, stage in self.stages.items()}
        view._inference_stages, view._engines = None, {}
        return view

    @contextlib.contextmanager
    def generating(self) -> Iterator[dict[int, Stage]]:
        """A context with the stages for inference, by number: the live weights (unsharded under ZeRO-3), without
        sequence parallelism. Makes no second copy; no step may be taken inside."""
        if self._inference_stages is None:
            self._inference_stages = {number: stage.whole_sequences() for number, stage in self.stages.items()}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for buckets in self.buckets.values():
                stack.enter_context(buckets.whole())
            yield self._inference_stages
