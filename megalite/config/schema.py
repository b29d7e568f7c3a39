"""The configuration of a run: frozen dataclasses, one for each section of a recipe.

Fields that follow from others when they are not given are declared `DERIVED` and filled in when the section is made,
so that whoever reads a configuration sees plain values. Sizes are counts, times are seconds, batch sizes are samples
(sequences) unless a field says otherwise. The text under each field is its help text.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

DERIVED: Any = None
"""Default of a field that `__post_init__` computes from others."""

KernelChoice = Literal["auto", "triton", "reference"]
AttentionChoice = Literal["auto", "triton", "sdpa", "reference"]


def _derive(section: object, **values: object) -> None:
    """Give the still undefined fields of a frozen section their values."""
    for name, value in values.items():
        if getattr(section, name) is DERIVED:
            object.__setattr__(section, name, value)


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what it draws its randomness from."""

    dir: str = "runs/default"
    """Directory of the run: configuration, metrics, checkpoints, logs. One that holds checkpoints is resumed."""
    seed: int = 1234
    """Seed of the initial weights and of the data order; the same in every layout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPUs when there are any."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family."""

    layers: int = 8
    """Decoder layers."""
    hidden_size: int = 512
    """Width of the residual stream."""
    ffn_hidden_size: int = DERIVED
    """Inner width of the SwiGLU feed-forward; by default 8/3 of hidden_size, rounded up to a multiple of 64."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = DERIVED
    """Key/value heads: heads is multi-head attention (the default), 1 multi-query, between them grouped-query."""
    head_dim: int = DERIVED
    """Width of one head; by default hidden_size / heads."""
    vocab_size: int = 0
    """Token ids run from 0 to vocab_size - 1; 0 takes the size from data.tokenizer."""
    max_positions: int = 4096
    """Longest sequence, in tokens, that the model is made for."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Stretching of the rotary frequencies: empty for none, or a table with `type` = `linear` {factor},
    `llama3` {factor, low_freq_factor, high_freq_factor, original_max_position_embeddings} or
    `yarn` {factor, original_max_position_embeddings; beta_fast, beta_slow, attention_factor, mscale,
    mscale_all_dim, truncate}."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output layer."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    sliding_window: int = 0
    """A token sees this many tokens, itself among them (Mistral); 0 sees all before it."""

    def __post_init__(self) -> None:
        _derive(
            self,
            ffn_hidden_size=-(-self.hidden_size * 8 // (3 * 64)) * 64,
            kv_heads=self.heads,
            head_dim=self.hidden_size // self.heads if self.heads > 0 and self.hidden_size % self.heads == 0 else 0,
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work; data parallelism is what is left of the world size."""

    tensor: int = 1
    """Ranks that split every layer's matrices. Keep it within one machine."""
    pipeline: int = 1
    """Ranks that split the layers into consecutive stages."""
    context: int = 1
    """Ranks that split each sequence."""
    sequence: bool = DERIVED
    """Split the activations between the matrices along the sequence; by default on where tensor > 1, and off at 1."""
    zero: int = 1
    """What the data-parallel ranks share out: 0 nothing, 1 the optimizer, 2 and the gradients, 3 and the parameters."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"] = "1f1b"
    """Order of the micro-batches in the pipeline."""
    virtual_stages: int = 1
    """Stages that each pipeline rank holds: 2 or more for schedule interleaved, 2 for zb_v."""

    def __post_init__(self) -> None:
        _derive(self, sequence=self.tensor > 1)
        if self.tensor == 1:
            object.__setattr__(self, "sequence", False)


@dataclass(frozen=True)
class DataConfig:
    """Token files, as tools/preprocess_data.py makes them; a prefix P names P.bin and P.idx."""

    train: tuple[Any, ...] = ()
    """Prefixes `["a", "b"]` (mixed in proportion to their sizes) or weights and prefixes `[[0.7, "a"], [0.3, "b"]]`."""
    valid: tuple[Any, ...] = ()
    """The same for the validation loss; empty takes it from `split`."""
    split: tuple[float, ...] = ()
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


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches, precision and evaluation."""

    steps: int = 1000
    """Optimizer steps of the whole plan; the learning rate and the data order follow it."""
    stop_after: int = 0
    """Stop, with a checkpoint, after this many steps of the plan; 0: run to its end."""
    seq_length: int = 1024
    """Tokens of one sample."""
    micro_batch_size: int = 1
    """Samples that one rank takes through the model at once."""
    global_batch_size: int = 8
    """Samples of one optimizer step over all ranks."""
    batch_ramp: tuple[int, ...] = ()
    """[start, increment, samples]: the batch grows from start by increment to global_batch_size, in equal shares of
    these first samples; empty: none."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32."""
    fp8: Literal["none", "tensor", "row"] = "none"
    """Linear layers' products in 8-bit floats with a scale for each tensor, or for each row; needs precision bf16."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping: nothing, the cheap large activations, whole layers."""
    deterministic: bool = False
    """Refuse operations whose results vary from run to run."""
    eval_interval: int = 0
    """Steps between validation losses; 0: none."""
    eval_samples: int = 64
    """Samples of one validation loss, rounded up to whole global micro-batches."""
    profile: tuple[int, ...] = ()
    """[first, last] steps to record with torch's profiler; empty: none."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normaliser, added to the loss (PaLM uses 1e-4)."""
    timeout_seconds: float = 600.0
    """A communication that takes longer than this means that a rank is lost, and ends the run (from the third step on:
    start-up has more patience). So does a rank that writes its part of a checkpoint for so much longer than another."""


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation computes each operation; the start-up log tells what was taken."""

    default: KernelChoice = "auto"
    """For every operation without its own line. `auto` takes what was measured fastest on the device."""
    attention: AttentionChoice = DERIVED
    """Causal attention; `sdpa` is torch's own."""
    rms_norm: KernelChoice = DERIVED
    """RMSNorm, with the residual sum."""
    rope: KernelChoice = DERIVED
    """Rotary positions of queries and keys."""
    swiglu: KernelChoice = DERIVED
    """silu(gate) * up."""
    cross_entropy: KernelChoice = DERIVED
    """Softmax cross-entropy over the (split) vocabulary."""
    adamw: KernelChoice = DERIVED
    """The optimizer's update."""

    def __post_init__(self) -> None:
        operations = ("attention", "rms_norm", "rope", "swiglu", "cross_entropy", "adamw")
        _derive(self, **dict.fromkeys(operations, self.default))


@dataclass(frozen=True)
class RecoveryConfig:
    """What to do about a loss that jumps: go back and leave out the data around it (PaLM's recipe)."""

    spike_threshold: float = 0.0
    """Robust standard deviations by which a loss must go up and stay up; 5 is recommended, 0: look for no spikes."""
    rollback_steps: int = 100
    """Go back to a checkpoint at least this many steps before the spike."""
    skip_steps: int = 200
    """Leave out the data of this many steps around the spike."""
    max_rollbacks: int = 3
    """End the run, as a fault, when it would go back more often. Ten times as many steps of progress as it went back, at
    least 100, earn a rollback back."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = DERIVED
    """Learning rate at the end of the plan; by default a tenth of lr."""
    warmup_steps: int = 0
    """Steps of linear growth from zero to lr."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Way from lr to min_lr after the warm-up; `wsd` (warm-up, stable, decay) holds lr until the last decay_steps."""
    decay_steps: int = 0
    """Steps of `wsd`'s decay, ending with the plan; 0: a fifth of the plan."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        _derive(self, min_lr=self.lr / 10)


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading."""

    interval: int = 1000
    """Steps between checkpoints; the last step always makes one. 0: only the last."""
    keep: int = 3
    """Newest checkpoints kept; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for ever; 0: none."""
    async_save: bool = False
    """Write in the background while training goes on."""
    load: str = ""
    """Start from this checkpoint, run directory or Hugging Face directory when run.dir holds no checkpoint yet."""
    load_optimizer: bool = True
    """false: take only the weights from `load`, and start at step 0 (fine-tuning)."""
    allow_data_change: bool = False
    """Go on from a checkpoint although its training data was another."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown and recorded besides metrics.jsonl."""

    interval: int = 1
    """Steps between lines of the text log."""
    tensorboard: bool = DERIVED
    """TensorBoard event files in run.dir/tensorboard; by default where the tensorboard package is installed."""
    wandb: bool = False
    """Report to Weights & Biases."""

    def __post_init__(self) -> None:
        _derive(self, tensorboard=importlib.util.find_spec("tensorboard") is not None)


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run, and the quantities that follow from it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

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
        """model.vocab_size rounded up to a multiple of parallel.tensor; the added columns are masked."""
        return -(-self.model.vocab_size // self.parallel.tensor) * self.parallel.tensor

    def data_parallel(self, world_size: int) -> int:
        """Copies of the model among `world_size` ranks."""
        return world_size // self.model_parallel

    def micro_batches(self, world_size: int, batch_size: int | None = None) -> int:
        """Micro-batches that each copy of the model takes in a step of `batch_size` samples (default: the full one)."""
        samples = self.train.global_batch_size if batch_size is None else batch_size
        return samples // (self.train.micro_batch_size * self.data_parallel(world_size))

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
        sizes = self.batch_sizes
        if len(sizes) == 1:
            return sizes[0]
        share = self.train.batch_ramp[2] / (len(sizes) - 1)
        return sizes[min(int(consumed_samples / share), len(sizes) - 1)]

    def samples_after(self, steps: int) -> int:
        """Samples that the first `steps` steps consume."""
        consumed = 0
        while steps > 0 and (size := self.batch_size_at(consumed)) < self.train.global_batch_size:
            consumed, steps = consumed + size, steps - 1
        return consumed + steps * self.train.global_batch_size
