"""What a run reads: its tokenizer and samples, and whether they fit. Imports no torch: mistakes are told at once."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from megalite.config import Config, check
from megalite.data.dataset import TokenDataset, build_datasets
from megalite.errors import UserError
from megalite.model.cost import parameter_count
from megalite.observe.trackers import require_credentials
from megalite.observe.words import counted
from megalite.text.tokenizers import load_tokenizer


def check_inputs(config: Config, ranks: int) -> str:
    """What `ranks` ranks would train, in one line.

    Raises:
        UserError: the configuration does not fit itself, that many ranks or the data.
    """
    check(config, ranks)
    require_credentials(config)
    config, _ = resolve_tokenizer(config)
    samples, _ = open_data(config)
    parts = [counted(parameter_count(config.model), "parameter"), counted(len(samples), "sample")]
    return f"ok: {', '.join([*parts, counted(ranks, 'rank')])}"


def resolve_tokenizer(config: Config) -> tuple[Config, int | None]:
    """The configuration with `model.vocab_size` known, and the tokenizer's end-of-document id where there is one."""
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
    first = next(entry for entry in config.data.train if not isinstance(entry, int | float))
    prefix = Path(first if isinstance(first, str) else first[-1])
    beside = prefix.parent / "megalite_cache"
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
        probe = beside / ".writable"
        probe.touch()
        probe.unlink()
        return beside
    return Path(config.run.dir) / "cache"


def open_data(config: Config) -> tuple[TokenDataset, TokenDataset | None]:
    """The training and validation samples of a run."""
    return build_datasets(
        config.data,
        seq_length=config.train.seq_length,
        seed=config.run.seed,
        train_samples=config.samples_after(config.train.steps),
        valid_samples=config.train.eval_samples if config.train.eval_interval else 0,
        vocab_size=config.model.vocab_size,
        cache_dir=index_folder(config),
    )
