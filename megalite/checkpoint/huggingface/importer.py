"""Import of a Hugging Face directory into a new run directory, a few hundred MiB at a time.

The run directory holds `checkpoints/step_00000000` (the weights in their original dtype, no optimizer state),
`config.toml` with the model, and `huggingface/` with the small files (config, tokenizer) that an export restores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from megalite.checkpoint.directory import CHECKPOINTS, step_name
from megalite.checkpoint.huggingface.export import BLOCK_BYTES, KEPT, Progress, appearing, kept_files
from megalite.checkpoint.huggingface.names import TOKENIZER_FILES, HuggingFaceSource
from megalite.checkpoint.huggingface.scorer import is_scorer
from megalite.checkpoint.source import Shapes, TensorSource, compare_shapes
from megalite.checkpoint.writer import CheckpointWriter
from megalite.config import Config, build_config, to_toml
from megalite.files import sync_directory, write_atomically
from megalite.model.shapes import model_shapes

_LONGEST = 4096
"""Upper limit of the sequence length in the generated recipe."""


def import_huggingface(directory: Path, run: Path, progress: Progress | None = None) -> Config:
    """Create the run directory `run` (new, or empty) from a Hugging Face directory; returns its recipe. Raises
    UserError."""
    with HuggingFaceSource(directory) as source:
        shapes = model_shapes(source.model, head="scalar" if is_scorer(source.config) else "vocabulary")
        compare_shapes(shapes, source.shapes(), str(directory))
        files = kept_files(directory)
        config = recipe_from_huggingface(source, run, files)
        with appearing(run) as partial:
            (partial / KEPT).mkdir()
            for name, content in files.items():
                write_atomically(partial / KEPT / name, content)
            sync_directory(partial / KEPT)
            write_atomically(partial / "config.toml", to_toml(config).encode())
            _write_checkpoint(source, partial / CHECKPOINTS / step_name(0), config, files, progress)
            sync_directory(partial / CHECKPOINTS)
    return config


def recipe_from_huggingface(source: HuggingFaceSource, run: Path, files: dict[str, bytes]) -> Config:
    """The recipe of the run directory `run`, made from a Hugging Face directory with these small files."""
    tokenizer = next((name for name in TOKENIZER_FILES[:2] if name in files), None)
    run = run.absolute()  # so that the recipe works from any folder
    return build_config(
        {
            "run": {"dir": str(run)},
            "model": dataclasses.asdict(source.model),
            "data": {"tokenizer": str(run / KEPT / tokenizer) if tokenizer else ""},
            "train": {
                "precision": source.precision,
                "seq_length": min(source.model.max_positions, _LONGEST),
            },
        }
    )


def _write_checkpoint(
    source: HuggingFaceSource, path: Path, config: Config, files: dict[str, bytes], progress: Progress | None
) -> None:
    shapes = source.shapes()
    with CheckpointWriter(path, step=0, model=dataclasses.asdict(config.model), state={}) as writer:
        write_tensors(writer, source, shapes, {name: source.dtype(name) for name in shapes}, progress)
        writer.add_file("config.toml", to_toml(config).encode())
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            if name in files:
                writer.add_file(name, files[name])


def write_tensors(
    writer: CheckpointWriter,
    source: TensorSource,
    shapes: Shapes,
    dtypes: Mapping[str, torch.dtype],
    progress: Progress | None,
) -> None:
    """Stream the tensors of these names and shapes from a source into a checkpoint, block by block."""
    total = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
    done = 0
    for name, shape in shapes.items():
        row_bytes = max(1, math.prod(shape[1:]) * dtypes[name].itemsize)
        rows = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shape[0], rows):
            offset = (start, *(0,) * (len(shape) - 1))
            block = source.read(name, offset, (min(rows, shape[0] - start), *shape[1:])).to(dtypes[name])
            writer.add(name, block, shape=shape, offset=offset)
            done += block.nbytes
            if progress is not None:
                progress(name, done, total)
