"""A run's inputs: its tokenizer and samples, checked against the configuration. Does not import torch, so that errors
are reported at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path

from megalite.config import Config, check
from megalite.config.sources import parse_sources
from megalite.data.dataset import TokenDataset, build_datasets
from megalite.data.examples import PackedExamples, PromptDataset
from megalite.errors import UserError
from megalite.model.cost import model_sizes, parameter_count
from megalite.observe.formatting import counted
from megalite.observe.trackers import require_credentials
from megalite.text.tokenizers import load_tokenizer

Data = TokenDataset | PackedExamples | PromptDataset

_ORDER_BYTES = 12
"""Minimum index memory per sample: its entries in the sample index and the shuffle."""


def check_inputs(config: Config, ranks: int, *, count_parameters: bool = True) -> str:
    """Describe in one line what `ranks` ranks would train; `count_parameters` builds a layer, and so imports torch.

    Raises:
        UserError: the configuration is inconsistent, or does not fit this number of ranks or the data.
    """
    check(config, ranks)
    require_credentials(config)
    config, _ = resolve_tokenizer(config)
    parameters = _parameters(config) if count_parameters else ""
    samples, _ = open_data(config)
    read: tuple[str, ...]
    if isinstance(samples, TokenDataset):
        read = (counted(len(samples), "sample"), _repetition(samples))
    else:
        from megalite.train.example_inputs import describe_examples

        read = describe_examples(config, samples)
    return "ok: " + ", ".join(filter(None, (parameters, *read, counted(ranks, "rank"))))


def _parameters(config: Config) -> str:
    """How many there are, and with an adapter how many of them are trained."""
    total = counted(parameter_count(config.model), "parameter")
    if config.adapter.kind == "none":
        return total
    from megalite.model.adapter import build_adapter  # loads torch

    build_adapter(config)  # refuses targets that the model does not have
    trained = model_sizes(config.model, adapter=config.adapter).adapter_parameters(config.model)
    return f"{total}, {trained:,} more of {config.adapter.kind} trained"


def _repetition(samples: TokenDataset) -> str:
    """The number of epochs over the most repeated token file; empty if none is repeated."""
    weights = samples.weights or [1.0]
    drawn = [weight * len(samples) * samples.seq_length for weight in weights]
    tokens = [source.cut.tokens_per_epoch for source in samples.sources]
    times, worst = max((each / own, index) for index, (each, own) in enumerate(zip(drawn, tokens, strict=True)))
    if times < 1.5:
        return ""
    which = "your" if len(tokens) == 1 else f"{samples.sources[worst].file.prefix}'s"
    return f"{times:,.0f} times {which} {_short(tokens[worst])} tokens"


def _short(number: int) -> str:
    """`55 M` for 55,123,456."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def resolve_tokenizer(config: Config) -> tuple[Config, int | None]:
    """The configuration with `model.vocab_size` filled in, and the tokenizer's end-of-document id if it has one."""
    if not config.data.tokenizer:
        return config, None
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size == 0:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        config = dataclasses.replace(config, model=model)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: data.tokenizer has {tokenizer.vocab_size} tokens; "
            f"set it to {tokenizer.vocab_size} or more, or to 0"
        )
    return config, tokenizer.eod


def index_folder(config: Config) -> Path:
    """Where sample indices are kept: `data.cache_dir`, else beside the first token file, else in the run directory."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir)
    beside = Path(parse_sources(config.data.train, "data.train")[0].prefix).parent / "megalite_cache"
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=beside):  # nameless, so that other ranks cannot remove it
            return beside
    return Path(config.run.dir) / "cache"


def open_data(config: Config, planned: int | None = None) -> tuple[Data, Data | None]:
    """The training and validation data of a run: samples of token files, packed examples or prompts, whichever
    `objective.kind` learns from. Planned for `planned` samples (default: those of the run's steps)."""
    samples = planned or config.samples_after(config.train.steps)
    folder = index_folder(config)
    if config.objective.data_format != "text":
        from megalite.train.example_inputs import open_examples

        return open_examples(config, samples, folder)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if samples * _ORDER_BYTES > memory:
        raise UserError(
            f"train.steps = {config.train.steps} reads {samples:,} samples, whose order takes "
            f"{samples * _ORDER_BYTES / 2**30:,.0f} GiB of this machine's {memory / 2**30:,.0f}; plan fewer steps"
        )
    return build_datasets(
        config.data,
        seq_length=config.train.seq_length,
        seed=config.run.seed,
        train_samples=samples,
        valid_samples=config.train.eval_samples if config.train.eval_interval else 0,
        vocab_size=config.model.vocab_size,
        cache_dir=folder,
    )
