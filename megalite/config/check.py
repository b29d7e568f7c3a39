"""Every combination that cannot work is refused here, before any process group starts, by field, value and remedy."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from megalite.config.schema import Config
from megalite.errors import UserError
from megalite.schedule.schedules import SCHEDULES

# Fields that the schema knows and the trainer does not act on yet: (field, the value is asked for, what to do instead).
NOT_BUILT: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("parallel.context", lambda ranks: ranks > 1, "use 1 and split with parallel.tensor or parallel.pipeline"),
)

# Least values, section by section.
_AT_LEAST_ONE = {
    "model": ("layers", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "max_positions"),
    "parallel": ("tensor", "pipeline", "context", "virtual_stages"),
    "train": ("steps", "seq_length", "micro_batch_size", "global_batch_size", "eval_samples"),
    "log": ("interval",),
}
_AT_LEAST_ZERO = {
    "run": ("seed",),
    "model": ("vocab_size", "sliding_window"),
    "train": ("stop_after", "eval_interval", "z_loss"),
    "recovery": ("spike_threshold", "rollback_steps", "skip_steps", "max_rollbacks"),
    "optimizer": ("min_lr", "warmup_steps", "decay_steps", "weight_decay", "clip_grad"),
    "checkpoint": ("interval", "keep", "keep_every"),
}
_ABOVE_ZERO = {
    "model": ("rope_theta", "norm_eps"),
    "train": ("timeout_seconds",),
    "optimizer": ("lr", "eps"),
}

_FP8_ALIGNMENT = 16  # matrix sizes of the hardware's FP8 products

# Keys that each type of model.rope_scaling needs, and those that it may have.
ROPE_SCALING: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def check(config: Config, world_size: int) -> None:
    """Refuse, with a UserError for the first mistake, what cannot run on `world_size` ranks of machines like this."""
    check_layout(config, world_size)
    check_machine(config)


def check_layout(config: Config, world_size: int) -> None:
    """Everything that follows from the numbers alone: no file, device or package is looked at."""
    _check_ranges(config)
    for path, asked_for, remedy in NOT_BUILT:
        if asked_for(_value(config, path)):
            _refuse(config, path, "is not built yet", remedy)
    _check_model(config)
    _check_split(config)
    _check_fp8(config)
    _check_world(config, world_size)
    _check_batches(config, world_size)
    _check_schedule_of_training(config)


def check_machine(config: Config) -> None:
    """Files that are named must be there, packages and devices that are asked for, too."""
    if not config.data.train:
        raise UserError("data.train is empty; name token files: --data.train '[\"data/corpus_text_document\"]'")
    for name in ("train", "valid"):
        for prefix in _prefixes(getattr(config.data, name)):
            _check_token_files(f"data.{name}", prefix)
    if config.train.eval_interval and not config.data.valid and sum(config.data.split[1:2]) == 0:
        remedy = "give data.valid or a data.split such as [99, 1], or set it to 0"
        _refuse(config, "train.eval_interval", "needs validation data", remedy)
    if config.model.vocab_size == 0 and not config.data.tokenizer:
        _refuse(config, "model.vocab_size", "is unknown", "give it, or data.tokenizer to take it from")
    if config.data.tokenizer not in ("", "byte"):
        _check_exists(config, "data.tokenizer", "a sentencepiece .model or a tokenizer.json")
    if config.checkpoint.load:
        _check_exists(config, "checkpoint.load", "a checkpoint, a run directory or a Hugging Face directory")
    _check_writable(config)
    for package in ("tensorboard", "wandb"):
        if _value(config, f"log.{package}") and importlib.util.find_spec(package) is None:
            _refuse(config, f"log.{package}", "needs a package", f"pip install {package}, or set it to false")
    if config.run.device == "cuda" or config.train.fp8 != "none":
        import torch

        if config.run.device == "cuda" and not torch.cuda.is_available():
            _refuse(config, "run.device", "but torch sees no GPU here", "use cpu or auto")
        on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
        if config.train.fp8 != "none" and on_gpu and torch.cuda.get_device_capability() < (8, 9):
            _refuse(config, "train.fp8", "needs a GPU of compute capability 8.9 (Ada, Hopper) or later", "use none")


def _value(config: Config, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def _refuse(config: Config, path: str, problem: str, remedy: str) -> NoReturn:
    value = _value(config, path)
    value = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    value = list(value) if isinstance(value, tuple) else value
    raise UserError(f"{path} = {value} {problem}; {remedy}")


def _divisors(number: int) -> str:
    """The divisors of a number, for remedies: at most the twelve smallest."""
    divisors = [candidate for candidate in range(1, min(number, 4096) + 1) if number % candidate == 0]
    return ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def _check_ranges(config: Config) -> None:
    for table, fits, remedy in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "it must be at least 1"),
        (_AT_LEAST_ZERO, lambda value: value >= 0, "it must be at least 0"),
        (_ABOVE_ZERO, lambda value: value > 0, "it must be above 0"),
    ):
        for path in (f"{section}.{name}" for section, names in table.items() for name in names):
            if not fits(_value(config, path)):
                _refuse(config, path, "is too small", remedy)
    for path in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= _value(config, path) < 1:
            _refuse(config, path, "is out of range", "it must be at least 0 and below 1")
    if config.parallel.zero not in (0, 1, 2, 3):
        _refuse(config, "parallel.zero", "is out of range", "it must be 0, 1, 2 or 3")
    if config.run.seed >= 2**32:
        _refuse(config, "run.seed", "is too large", f"it must be below {2**32}")
    if config.data.split and (min(config.data.split) < 0 or config.data.split[0] <= 0 or len(config.data.split) > 3):
        remedy = "give the shares of training, validation and test, as [969, 30, 1]; training's above 0"
        _refuse(config, "data.split", "is out of range", remedy)
    for name in ("train", "valid"):
        weights = [entry[0] for entry in getattr(config.data, name) if isinstance(entry, tuple)]
        if weights and (min(weights) < 0 or sum(weights) <= 0):
            _refuse(config, f"data.{name}", "has a negative weight, or none above 0", "give each prefix its share")
        if weights and len(weights) < len(getattr(config.data, name)):
            _refuse(config, f"data.{name}", "mixes weighted and plain prefixes", "give all of them weights, or none")


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_dim == 0:
        remedy = f"give model.head_dim, or a multiple of the {model.heads} heads"
        _refuse(config, "model.hidden_size", f"is not divisible by model.heads = {model.heads}", remedy)
    if model.head_dim < 2 or model.head_dim % 2:
        _refuse(
            config, "model.head_dim", "does not split into the pairs that rotary positions turn", "use an even size"
        )
    if model.heads % model.kv_heads:
        remedy = f"use one of {_divisors(model.heads)}"
        _refuse(config, "model.kv_heads", f"does not divide model.heads = {model.heads}", remedy)
    if config.train.seq_length > model.max_positions:
        remedy = "shorten it or raise model.max_positions"
        _refuse(config, "train.seq_length", f"exceeds model.max_positions = {model.max_positions}", remedy)
    if model.rope_scaling:
        _check_rope_scaling(model.rope_scaling)


def _check_rope_scaling(table: dict[str, Any]) -> None:
    kind = table.get("type")
    if kind not in ROPE_SCALING:
        raise UserError(f"model.rope_scaling.type = {kind!r} is unknown; known are {', '.join(ROPE_SCALING)}")
    needed, optional = ROPE_SCALING[kind]
    given = set(table) - {"type"}
    if needed - given:
        raise UserError(f"model.rope_scaling = {table} lacks {', '.join(sorted(needed - given))}; {kind} needs it")
    if given - needed - optional:
        known = ", ".join(sorted(needed | optional))
        raise UserError(
            f"model.rope_scaling has unknown {', '.join(sorted(given - needed - optional))}; {kind} has {known}"
        )
    for key in sorted(given - {"truncate"}):
        if isinstance(table[key], bool) or not isinstance(table[key], int | float) or table[key] <= 0:
            raise UserError(f"model.rope_scaling.{key} = {table[key]!r} is not a number above 0")
    if table["factor"] < 1:
        raise UserError(
            f"model.rope_scaling.factor = {table['factor']} is below 1; it says how much longer contexts get"
        )
    if kind == "llama3" and table["low_freq_factor"] >= table["high_freq_factor"]:
        low, high = table["low_freq_factor"], table["high_freq_factor"]
        raise UserError(f"model.rope_scaling.low_freq_factor = {low} is not below high_freq_factor = {high}; swap them")


def _check_split(config: Config) -> None:
    """Whether the model divides into the asked-for shards and stages."""
    model, parallel = config.model, config.parallel
    for path in ("model.heads", "model.ffn_hidden_size"):
        size = _value(config, path)
        if size % parallel.tensor:
            remedy = f"use a parallel.tensor out of {_divisors(model.heads)}"
            if path == "model.ffn_hidden_size":
                remedy = f"use {_nearest_multiples(size, parallel.tensor)}, or another parallel.tensor"
            _refuse(config, path, f"is not divisible by parallel.tensor = {parallel.tensor}", remedy)
    if parallel.sequence and config.train.seq_length % parallel.tensor:
        remedy = f"use {_nearest_multiples(config.train.seq_length, parallel.tensor)}, or parallel.sequence = false"
        problem = f"is not divisible by parallel.tensor = {parallel.tensor}, which parallel.sequence needs"
        _refuse(config, "train.seq_length", problem, remedy)
    chunks = SCHEDULES[parallel.schedule].chunks
    if parallel.schedule != "interleaved" and parallel.virtual_stages != chunks:
        remedy = f"use {chunks}, or parallel.schedule = interleaved"
        _refuse(config, "parallel.virtual_stages", f"does not fit parallel.schedule = {parallel.schedule}", remedy)
    if parallel.schedule == "zb_v" and parallel.pipeline < 2:
        _refuse(config, "parallel.pipeline", "is too small for parallel.schedule = zb_v", "use 2 or more")
    if parallel.schedule == "interleaved":
        if parallel.virtual_stages < 2:
            remedy = "use 2 or more, or parallel.schedule = 1f1b"
            _refuse(config, "parallel.virtual_stages", "is too small for parallel.schedule = interleaved", remedy)
        if parallel.pipeline < 2:
            remedy = "use 2 or more, or parallel.schedule = 1f1b"
            _refuse(config, "parallel.pipeline", "is too small for parallel.schedule = interleaved", remedy)
    if model.layers < config.stages:
        stages = f"the {config.stages} stages of parallel.pipeline = {parallel.pipeline}"
        if parallel.virtual_stages > 1:
            stages += f" times parallel.virtual_stages = {parallel.virtual_stages}"
        _refuse(config, "model.layers", f"is fewer than {stages}", "use fewer stages or more layers")


def _check_fp8(config: Config) -> None:
    """FP8 products need bf16 and sizes that are multiples of 16 on every tensor rank."""
    if config.train.fp8 == "none":
        return
    if config.train.precision != "bf16":
        _refuse(config, "train.fp8", f"needs train.precision = bf16, not {config.train.precision}", "use none, or bf16")
    model, ranks = config.model, config.parallel.tensor
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_hidden_size // ranks,
        "model.heads": model.heads // ranks * model.head_dim,
        "model.kv_heads": model.kv_heads * model.head_dim // math.gcd(model.kv_heads, ranks),
    }
    for path, size in sizes.items():
        if size % _FP8_ALIGNMENT:
            problem = f"gives a tensor rank a matrix of {size} rows or columns, and train.fp8 = {config.train.fp8}"
            _refuse(config, path, f"{problem} needs multiples of {_FP8_ALIGNMENT}", "use none, or other sizes")


def _check_world(config: Config, world_size: int) -> None:
    parallel = config.parallel
    if world_size % config.model_parallel:
        raise UserError(
            f"{world_size} processes are not divisible by parallel.tensor = {parallel.tensor} * parallel.pipeline = "
            f"{parallel.pipeline} * parallel.context = {parallel.context}; start a multiple of {config.model_parallel}"
        )


def _check_batches(config: Config, world_size: int) -> None:
    train, ramp = config.train, config.train.batch_ramp
    if ramp:
        if len(ramp) != 3 or ramp[0] < 1 or ramp[1] < 1 or ramp[2] < 0:
            _refuse(
                config, "train.batch_ramp", "is not a ramp", "give [start, increment, samples], as [32, 32, 100000]"
            )
        if ramp[0] > train.global_batch_size or (train.global_batch_size - ramp[0]) % ramp[1]:
            problem = f"does not reach train.global_batch_size = {train.global_batch_size} in whole increments"
            _refuse(config, "train.batch_ramp", problem, "choose start and increment so that it does")
    copies = config.data_parallel(world_size)
    unit = train.micro_batch_size * copies
    for size in config.batch_sizes:
        path = "train.global_batch_size" if size == train.global_batch_size else "train.batch_ramp"
        what = "" if size == train.global_batch_size else f"goes through {size}, which "
        if size % unit:
            problem = f"{what}is not divisible by train.micro_batch_size = {train.micro_batch_size} * {copies} copies"
            _refuse(config, path, f"{problem} of the model", f"use {_nearest_multiples(size, unit)}")
        if config.parallel.schedule == "interleaved" and size // unit % config.parallel.pipeline:
            problem = f"{what}makes {size // unit} micro-batches, not divisible by parallel.pipeline = "
            remedy = f"use {_nearest_multiples(size, unit * config.parallel.pipeline)}, or parallel.schedule = 1f1b"
            _refuse(config, path, f"{problem}{config.parallel.pipeline}, which interleaving needs", remedy)


def _check_schedule_of_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    if train.stop_after > train.steps:
        _refuse(
            config, "train.stop_after", f"exceeds train.steps = {train.steps}", "use at most that, or 0 for no stop"
        )
    if optimizer.min_lr > optimizer.lr:
        _refuse(config, "optimizer.min_lr", f"exceeds optimizer.lr = {optimizer.lr}", "use at most that")
    if optimizer.warmup_steps > train.steps:
        remedy = "warm up within the plan"
        _refuse(config, "optimizer.warmup_steps", f"exceeds train.steps = {train.steps}", remedy)
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + config.decay_steps > train.steps:
        problem = f"and optimizer.warmup_steps = {optimizer.warmup_steps} exceed train.steps = {train.steps}"
        _refuse(config, "optimizer.decay_steps", problem, "shorten one of them")
    if train.profile and (len(train.profile) != 2 or not 1 <= train.profile[0] <= train.profile[1]):
        _refuse(config, "train.profile", "is not a range of steps", "give [first, last], as [10, 12]")
    if config.checkpoint.keep_every and (
        not config.checkpoint.interval or config.checkpoint.keep_every % config.checkpoint.interval
    ):
        problem = f"is not a multiple of checkpoint.interval = {config.checkpoint.interval}"
        _refuse(config, "checkpoint.keep_every", problem, "no checkpoint is made at such steps; use a multiple")


def _prefixes(sources: Iterable[Any]) -> list[str]:
    return [source if isinstance(source, str) else source[1] for source in sources]


def _check_token_files(path: str, prefix: str) -> None:
    for suffix in (".bin", ".idx"):
        if Path(prefix + suffix).is_file():
            continue
        if prefix.endswith((".bin", ".idx")):
            raise UserError(f"{path} names {prefix}; give the prefix without {prefix[-4:]}: {prefix[:-4]}")
        raise UserError(
            f"{path} names {prefix}, but {prefix}{suffix} does not exist; make it with tools/preprocess_data.py"
        )


def _check_exists(config: Config, path: str, what: str) -> None:
    if not Path(_value(config, path)).exists():
        _refuse(config, path, "does not exist", f"name {what}")


def _check_writable(config: Config) -> None:
    """The run directory, or the nearest directory above it that exists, must take files."""
    place = Path(config.run.dir).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        _refuse(config, "run.dir", f"cannot be made, since {place} is a file", "choose another directory")
    if not os.access(place, os.W_OK | os.X_OK):
        _refuse(config, "run.dir", f"cannot be written, since {place} is read-only for this user", "choose another")
