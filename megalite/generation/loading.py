"""A trained model, ready to generate or to be scored: from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megalite.checkpoint.huggingface.export import recipe_of
from megalite.checkpoint.huggingface.names import TOKENIZER_FILES, HuggingFaceSource
from megalite.checkpoint.source import CheckpointReader, TensorSource, fill_model
from megalite.checkpoint.weights import Source, open_weights
from megalite.cli import Parser, nonempty
from megalite.config import Config, build_config
from megalite.config.check import check_layout, check_token_graph
from megalite.config.load import parse_overrides
from megalite.cuda_graph import GraphRecorder, recorder_for
from megalite.errors import RunFailed, UserError
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.runtime import SILENCE_SECONDS, World, choose_device, connect
from megalite.text.leading import leading_ids
from megalite.text.tokenizers import TEMPLATE_FILE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megalite.text.chat import ChatTemplate

Result = TypeVar("Result")

_EPILOG = (
    "also: --parallel.tensor N --parallel.pipeline N --parallel.context N --parallel.expert N "
    "--train.precision fp32|bf16 --run.device cpu|cuda"
)
_OVERRIDES = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "train.precision",
    "run.device",
    "kernels.",
)


def checkpoint_parser(description: str | None) -> Parser:
    """The command line of a program on a trained model: `--checkpoint`, and overrides for `load_model`."""
    parser = Parser(description, _EPILOG, overrides=parse_overrides)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=nonempty,
        metavar="DIR",
        help="run directory, checkpoint or Hugging Face directory",
    )
    return parser


def with_one_voice(main: Callable[[], Result]) -> Callable[[], Result]:
    """Decorate a program that runs on many ranks: a mistake that all of them find is said once, by rank 0.

    The others keep silent for a while, in which the launcher ends them; what they alone found they then say.
    """

    @functools.wraps(main)
    def guarded() -> Result:
        try:
            return main()
        except (UserError, RunFailed):
            if World.from_environment().rank > 0:
                time.sleep(SILENCE_SECONDS)
            raise

    return guarded


@dataclass(frozen=True)
class Opened:
    """A checkpoint of either kind: its weights, and what is known of its model, precision and tokenizer."""

    source: TensorSource
    directory: Path
    model: dict[str, Any]
    precision: str
    tokenizer: Tokenizer | None
    bos: tuple[int, ...]
    """What the tokenizer of a Hugging Face model puts before every text."""
    eos: tuple[int, ...]
    """Tokens that end a text."""
    document_mask: bool = False
    """Whether attention was trained to see the token's own document only."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """The recipe's section of that name: what is put around the linear layers."""

    def chat_template(self, name: str = "") -> ChatTemplate:
        """The template that the model was trained with (or another, by file or name). Raises UserError."""
        from megalite.text.chat import ChatTemplate  # loads Jinja, which text alone does not need

        tokenizer = self.require_tokenizer("a conversation needs one")
        kept = self.directory / TEMPLATE_FILE
        return ChatTemplate.load(tokenizer, name or (kept if kept.is_file() else ""))

    def require_tokenizer(self, remedy: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{self.directory} carries no tokenizer; {remedy}")
        return self.tokenizer


@contextmanager
def open_checkpoint(path: str | Path, tokenizer: str = "") -> Iterator[Opened]:
    """Open a run directory (its newest complete checkpoint), a checkpoint, a Hugging Face or PEFT directory.

    `tokenizer` replaces the one that the checkpoint carries. Raises UserError.
    """
    with open_weights(path) as source:
        if isinstance(source.adapter, CheckpointReader):
            opened = _opened_run(source.adapter, tokenizer)
        elif isinstance(source.tensors, CheckpointReader):
            opened = _opened_run(source.tensors, tokenizer)
        else:
            opened = _opened_huggingface(source.tensors, tokenizer)
        yield _with_adapter(opened, source)


def _with_adapter(opened: Opened, source: Source) -> Opened:
    """The same with all tensors, where the adapter lies apart from its base."""
    if source.adapter is None:
        return opened
    adapter = dataclasses.asdict(source.adapter_config)
    return dataclasses.replace(opened, source=source.beside(), adapter=adapter)


def _opened_huggingface(source: TensorSource, name: str) -> Opened:
    assert isinstance(source, HuggingFaceSource)
    chosen = Path(name) if name else _first_existing(source.directory, TOKENIZER_FILES[:2])
    loaded = load_tokenizer(chosen) if chosen is not None else None
    eos = source.eos_ids()
    if eos is None:
        eos = () if loaded is None or loaded.eod is None else (loaded.eod,)
    model = dataclasses.asdict(source.model)
    return Opened(source, source.directory, model, source.precision, loaded, leading_ids(loaded), eos)


def _opened_run(reader: CheckpointReader, name: str) -> Opened:
    recipe = recipe_of(reader)
    chosen = name or reader.tokenizer or recipe.get("data", {}).get("tokenizer", "")
    loaded = load_tokenizer(chosen) if chosen else None
    eos = () if loaded is None or loaded.eod is None else (loaded.eod,)
    precision = recipe.get("train", {}).get("precision", "fp32")
    masked = bool(recipe.get("data", {}).get("document_mask", False))
    model = dict(reader.manifest.model)
    adapter = dict(recipe.get("adapter", {}))
    return Opened(reader, reader.directory, model, precision, loaded, leading_ids(loaded), eos, masked, adapter)


def _first_existing(directory: Path, names: Sequence[str]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


@dataclass(frozen=True)
class Loaded:
    """This rank's part of the model with its weights, and where it stands."""

    config: Config
    mesh: Mesh
    model: ShardedModel
    recorder: GraphRecorder | None = None
    """What records the loop of tokens as a CUDA graph, if that was asked for."""

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that prints."""
        return self.mesh.rank == 0


@contextmanager
def load_model(
    opened: Opened,
    overrides: Sequence[str],
    *,
    seq_length: int | None = None,
    data_parallel: bool = False,
    cuda_graph: bool = False,
) -> Iterator[Loaded]:
    """Join the other ranks, build this rank's stage and fill it. Raises UserError, the same on every rank.

    `overrides` are those of `_OVERRIDES`, as for the trainer. `seq_length`: of the sequences to be scored. Only with
    `data_parallel` may there be more ranks than one copy of the model takes; without it, ranks that share the experts
    do the same work on the rest. `cuda_graph`: tokens shall be recorded as a graph (`--cuda-graph`).
    """
    world = World.from_environment()
    config = _inference_config(opened, overrides, seq_length, world.size)
    needed = config.model_parallel * config.parallel.expert
    if not data_parallel and needed != world.size:
        raise UserError(
            f"{world.size} process{'es' * (world.size > 1)}, but parallel.tensor * parallel.pipeline * "
            f"parallel.context * parallel.expert = {needed}; "
            "make them equal, as in --parallel.tensor 2 with torchrun --nproc-per-node 2"
        )
    check_layout(config, world.size)
    if cuda_graph:
        check_token_graph(config, "--cuda-graph")
    device = choose_device(config, world)
    recorder = recorder_for(device, "--cuda-graph") if cuda_graph else None
    mesh = connect(config, world, device)
    kernels = select_kernels(dataclasses.asdict(config.kernels), device)
    model = ShardedModel(config, mesh, kernels, trained=False)
    fill_model(model, opened.source)
    yield Loaded(config, mesh, model, recorder)
    mesh.world.all_reduce(torch.zeros(1, device=device)).wait()  # nobody leaves while another still talks
    if dist.is_initialized():
        dist.destroy_process_group()


def _inference_config(opened: Opened, overrides: Sequence[str], seq_length: int | None, world_size: int) -> Config:
    values = parse_overrides(overrides)
    for section, name in values:
        if not f"{section}.{name}".startswith(_OVERRIDES):
            raise UserError(f"--{section}.{name} has no effect here; known are {', '.join(_OVERRIDES)}…")
    tables: dict[str, dict[str, Any]] = {
        "model": opened.model,
        "adapter": opened.adapter,
        "parallel": {"sequence": False, "zero": 0},
        "train": {"precision": opened.precision, "global_batch_size": world_size},
    }
    for (section, name), value in values.items():
        tables.setdefault(section, {})[name] = value
    config = build_config(tables)
    size = config.model_parallel
    if seq_length is None:  # generation pads what it reads to as many as there are pieces
        seq_length = 2 * config.parallel.context if config.parallel.context > 1 else 1
    batch = dataclasses.replace(config.train, seq_length=seq_length, global_batch_size=max(1, world_size // size))
    return dataclasses.replace(config, train=batch)
