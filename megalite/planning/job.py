"""The job to plan: a model, a layout, batches, a kind of device, and the practices of the trainer."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megalite.checkpoint.weights import open_weights
from megalite.config import Config, ModelConfig
from megalite.config.lengths import padded_length
from megalite.model.adapter import build_adapter
from megalite.model.partition import layers_of_stage
from megalite.objective import Reads, build_objective, head_for
from megalite.objective.work import Passes, has_critic, has_reference, passes_of
from megalite.planning.architecture import Architecture, LayerShare, layers_on
from megalite.planning.hardware import Device
from megalite.schedule.ops import Plan, stage_owners
from megalite.schedule.schedules import build_schedule, in_pairs


@dataclass(frozen=True)
class Practice:
    """How a program does the work, as far as time depends on it; the defaults are megalite's.

    The others exist to compare with published numbers: one description for each program, never for a single number.
    """

    name: str = "megalite"
    explicit_attention: bool = False
    """Scores are written to memory and read again (before flash attention), their whole square computed."""
    elementwise: float = 1.0
    """Bytes that element-wise work moves, as a multiple of what fused kernels do."""
    logit_bytes: float = 8.0
    """Bytes that the loss moves for each logit; fused kernels in bf16: read twice, written twice."""
    loss_in_forward: bool = True
    """The output layer's gradients are made in its forward pass."""
    gradient_bytes: float = 12.0
    """Bytes moved to add a weight's gradient to its fp32 sum: fresh product written and read, sum read and written."""
    attention: float = 1.0
    """Rate of attention, as a multiple of the device's best kernels."""
    overlaps_tensor: Literal["none", "backward", "all"] = "backward"
    """The passes that overlap tensor-parallel collectives with GEMMs."""
    hiding_cost: float = 0.3
    """What a hidden one still costs, as a share of its time: NCCL's kernels take processors from the product.

    Measured on 8 H100 (pytorch pull request 172714): a product of 8192 cubed and an all-gather of 64 MiB a rank take
    2.96 ms one after the other (by the planner 1.6 and 1.4), 2.02 ms at once, and 1.77 with copy engines: 0.13.
    """
    gather_efficiency: float = 1.0
    """Share of the link's rate at which ZeRO-3 gathers parameters and reduces gradients."""
    gathers_hide: bool = True
    """Whether the parameters of an update are gathered under the next forward passes. Not so where something that is
    needed at once, such as vectors or the count of units, queues behind them."""
    reductions_end: bool = True
    """Whether a rank waits for reductions after its last operation, and not after the last backward of each stage."""


MEGALITE = Practice()


@dataclass(frozen=True)
class Rollout:
    """The answers that one copy of the model writes in a step: `answers` in batches of `batch`.

    Planned is the longest that the recipe allows: `prompt` and `tokens` (both in tokens) fill a row.
    """

    answers: int
    batch: int
    prompt: int
    tokens: int
    epochs: int
    minibatches: int

    @property
    def batches(self) -> int:
        return -(-self.answers // self.batch)

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class Beside:
    """The models beside the trained one, in the same layout; `reward_model` may be of another shape."""

    reference: bool = False
    own_reference: bool = False
    """The reference is the trained model without its adapter: it scores, and takes no memory."""
    critic: bool = False
    reward_model: Architecture | None = None


@dataclass(frozen=True)
class Job:
    """One step of training on one layout. Sizes as in the configuration.

    `micro_batches` are those of one replica in an optimizer step. `reads` is what the objective reads of the last
    stage, and decides its head. `passes` are those of the step over its tokens, where they are known.
    """

    architecture: Architecture
    device: Device
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    context_mode: str = "gather"
    sequence: bool = False
    overlap_splits: int = 1
    keep_gathered: bool = False
    two_batch_overlap: bool = False
    zero: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    recompute: str = "none"
    element_bytes: int = 2
    practice: Practice = MEGALITE
    reads: Reads = "loss"
    passes: tuple[Passes, ...] = ()
    beside: Beside = Beside()
    rollout: Rollout | None = None
    expert: int = 1
    fp8: bool = False
    optimizer: str = "adamw"
    newton_schulz_steps: int = 5
    dense: bool = False
    """Look at the layers without experts, of a model in which others have some (`kinds`)."""

    @staticmethod
    def of(config: Config, world_size: int, device: Device, reward_model: ModelConfig | None = None) -> Job:
        """The job of a configuration that `check_layout` has accepted for `world_size` ranks.

        `reward_model` is that of `reward_model_of`, where it is known already: it may have to be read from a file.
        """
        parallel, train = config.parallel, config.train
        build_adapter(config)  # refuses targets that the model does not have
        reward_model = reward_model or reward_model_of(config)
        return Job(
            reads=build_objective(config).reads,
            passes=passes_of(config, reward_model),
            beside=Beside(
                reference=has_reference(config),
                own_reference=config.adapter.kind != "none" and not config.objective.reference,
                critic=has_critic(config),
                reward_model=Architecture(reward_model) if reward_model is not None else None,
            ),
            rollout=_rollout_of(config, world_size),
            architecture=Architecture(config.model, config.adapter),
            device=device,
            seq_length=train.seq_length,
            micro_batch_size=train.micro_batch_size,
            micro_batches=config.micro_batches(world_size),
            data=config.data_parallel(world_size),
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            context=parallel.context,
            context_mode=parallel.context_mode,
            sequence=bool(parallel.sequence),
            overlap_splits=parallel.overlap_splits(gpu=device.is_gpu),
            keep_gathered=parallel.keep_gathered,
            two_batch_overlap=parallel.two_batch_overlap,
            zero=parallel.zero,
            schedule=parallel.schedule,
            virtual_stages=parallel.virtual_stages,
            recompute=train.recompute,
            element_bytes=4 if train.precision == "fp32" else 2,
            expert=parallel.expert,
            fp8=train.fp8 != "none",
            optimizer=config.optimizer.kind,
            newton_schulz_steps=config.optimizer.newton_schulz_steps,
        )

    @property
    def world(self) -> int:
        return self.replicas * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights and train on different tokens; ZeRO shares out over them."""
        return self.data * self.context

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual_stages

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, padding included."""
        return self.micro_batch_size * padded_length(self.seq_length, self.context, self.split) // self.context

    @property
    def tokens_per_step(self) -> int:
        minibatches = self.rollout.minibatches if self.rollout is not None else 1
        return self.seq_length * self.micro_batch_size * self.micro_batches * self.data * minibatches

    @property
    def head(self) -> str:
        """The head of the trained model, as `megalite.model.sharded.ShardedModel` names it."""
        return head_for(self.reads)

    @property
    def split(self) -> int:
        """Into how many parts activations are cut between tensor-parallel blocks."""
        return self.tensor if self.sequence else 1

    def plan(self, micro_batches: int | None = None) -> Plan:
        """The schedule's own operations."""
        micro_batches = self.micro_batches if micro_batches is None else micro_batches
        plan = _plan(self.schedule, self.pipeline, micro_batches, self.virtual_stages)
        return in_pairs(plan) if self.two_batch_overlap else plan

    @functools.cached_property
    def layer(self) -> LayerShare:
        """One layer on the tensor rank that holds most."""
        return self.architecture.layer(self.tensor, expert=self.expert, dense=self.dense)

    def kinds(self, stage: int) -> tuple[tuple[Job, int], ...]:
        """This job and the number of layers of a stage; for a model that mixes layers, once for each kind."""
        dense = self._dense_layers[stage]
        if not dense:
            return ((self, self.layers[stage]),)
        pairs = ((self, self.layers[stage] - dense), (self._for_dense, dense))
        return tuple(pair for pair in pairs if pair[1])

    @functools.cached_property
    def _for_dense(self) -> Job:
        return dataclasses.replace(self, dense=True)

    @functools.cached_property
    def _dense_layers(self) -> tuple[int, ...]:
        model = self.architecture.model
        if not model.experts:
            return (0,) * self.stages
        ranges = (layers_of_stage(model, self.stages, stage) for stage in range(self.stages))
        return tuple(sum(not model.is_sparse(layer) for layer in layers) for layers in ranges)

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """How many layers each stage holds."""
        return tuple(layers_on(self.architecture, self.stages, stage) for stage in range(self.stages))

    @functools.cached_property
    def owners(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        return _owners(self.schedule, self.pipeline, self.virtual_stages)

    @property
    def shares_vocabulary(self) -> bool:
        """Whether one rank holds embedding and output layer as one tensor."""
        owners = self.owners
        return self.head == "vocabulary" and self.architecture.model.tie_embeddings and owners[0] == owners[-1]

    @functools.cached_property
    def splits_backward(self) -> bool:
        """Whether the schedule puts weight gradients off: what their collectives were hidden under is then gone."""
        return any(op.kind == "W" for op in _short_plan(self.schedule, self.pipeline, self.virtual_stages)[0])

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage, owner in enumerate(self.owners) if owner == rank]

    def alike(self, stage: int) -> tuple[int, int, bool, bool, bool]:
        """Stages with equal answers cost the same: layers, first, last, whether the next one is elsewhere."""
        last = stage == self.stages - 1
        elsewhere = last or self.owners[stage] != self.owners[stage + 1]
        return self.layers[stage], self._dense_layers[stage], stage == 0, last, elsewhere


@functools.lru_cache(maxsize=128)
def _plan(schedule: str, ranks: int, micro_batches: int, chunks: int) -> Plan:
    return build_schedule(schedule, ranks, micro_batches, chunks)


def _short_plan(schedule: str, ranks: int, chunks: int) -> Plan:
    return _plan(schedule, ranks, ranks, chunks)


@functools.lru_cache(maxsize=256)
def _owners(schedule: str, ranks: int, chunks: int) -> tuple[int, ...]:
    return stage_owners(_short_plan(schedule, ranks, chunks))


def reward_model_of(config: Config) -> ModelConfig | None:
    """The reward model of a recipe, if it names one: what its checkpoint says, or where there is none yet one as large
    as the policy."""
    path = config.rollout.reward_model
    if not path or config.objective.data_format != "prompt":
        return None
    if not Path(path).exists():
        return config.model
    with open_weights(path) as source:
        return source.architecture


def _rollout_of(config: Config, world_size: int) -> Rollout | None:
    if config.objective.data_format != "prompt":
        return None
    rollout = config.rollout
    answers = config.answers_per_step // config.data_parallel(world_size)
    return Rollout(
        answers=answers,
        batch=min(rollout.batch_size or answers, answers),
        prompt=config.train.seq_length - rollout.max_new_tokens,
        tokens=rollout.max_new_tokens,
        epochs=config.policy.epochs,
        minibatches=config.policy.minibatches,
    )
