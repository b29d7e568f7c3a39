"""An adapter merged into its base: a run directory with whole weights, written a few hundred MiB at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.directory import CHECKPOINTS, step_name
from megalite.checkpoint.huggingface.export import (
    KEPT,
    Progress,
    appearing,
    files_beside,
    kept_files,
    recipe_of,
)
from megalite.checkpoint.huggingface.importer import recipe_from_huggingface, write_tensors
from megalite.checkpoint.huggingface.names import TOKENIZER_FILES, HuggingFaceSource
from megalite.checkpoint.manifest import WEIGHT
from megalite.checkpoint.source import CheckpointReader, TensorSource, compare_shapes, needed
from megalite.checkpoint.tensor_file import DTYPES
from megalite.checkpoint.weights import Source, open_weights
from megalite.checkpoint.writer import CheckpointWriter
from megalite.config import Config, build_config, to_toml
from megalite.errors import UserError
from megalite.files import sync_directory, write_atomically
from megalite.model.decoder import SCORE
from megalite.model.shapes import model_shapes


def merge_adapter(checkpoint: Path, run: Path, progress: Progress | None = None) -> Config:
    """Create the run directory `run` (new, or empty) from an adapter's checkpoint or PEFT directory and its base.

    Tensors keep the dtype that they have in the base. Returns the recipe. Raises UserError.
    """
    with open_weights(checkpoint) as source:
        if source.adapter is None:
            raise UserError(f"{checkpoint} holds no adapter apart from its base, so there is nothing to merge")
        whole, model = source.whole(), source.architecture
        expected = model_shapes(model, head="scalar" if SCORE in whole.shapes() else "vocabulary")
        shapes = needed(whole.shapes(), expected)
        compare_shapes(expected, shapes, str(checkpoint))
        kept = _kept(source.tensors)
        config, extras = _recipe(source, run, kept), _extras(source, kept)
        with appearing(run) as partial:
            if kept:
                (partial / KEPT).mkdir()
                for name, content in kept.items():
                    write_atomically(partial / KEPT / name, content)
                sync_directory(partial / KEPT)
            text = to_toml(config).encode()
            write_atomically(partial / "config.toml", text)
            place = partial / CHECKPOINTS / step_name(0)
            with CheckpointWriter(place, step=0, model=source.model, state={}) as writer:
                dtypes = {name: _dtype(source, name) for name in shapes}
                write_tensors(writer, whole, {name: shapes[name] for name in expected}, dtypes, progress)
                for name, content in {**extras, "config.toml": text}.items():
                    writer.add_file(name, content)
            sync_directory(partial / CHECKPOINTS)
    return config


def _dtype(source: Source, name: str) -> torch.dtype:
    """What a tensor of the merged model is stored in."""
    base = source.tensors
    if name not in base.shapes():
        return torch.float32
    if isinstance(base, CheckpointReader):
        return DTYPES[base.manifest.index[WEIGHT][name].dtype]
    assert isinstance(base, HuggingFaceSource)
    return base.dtype(name)


def _kept(base: TensorSource) -> dict[str, bytes]:
    """The small Hugging Face files of the base, for an export of the merged model."""
    if isinstance(base, CheckpointReader):
        return files_beside(base)
    assert isinstance(base, HuggingFaceSource)
    return kept_files(base.directory)


def _extras(source: Source, kept: dict[str, bytes]) -> dict[str, bytes]:
    """Tokenizer and chat template: the adapter's, else the base's."""
    for reader in (source.adapter, source.tensors):
        if isinstance(reader, CheckpointReader):
            names = [name for name in reader.manifest.extras if name != "config.toml"]
            return {name: reader.extra(name) for name in names}
    return {name: kept[name] for name in TOKENIZER_FILES[:3] if name in kept}


def _recipe(source: Source, run: Path, kept: dict[str, bytes]) -> Config:
    """What the merged model is trained on with: the adapter's recipe as far as it speaks of model, data and lengths."""
    if isinstance(source.tensors, HuggingFaceSource):
        plain = recipe_from_huggingface(source.tensors, run, kept)
    else:
        plain = build_config({"run": {"dir": str(run.absolute())}, "model": dict(source.model)})
    readers = [reader for reader in (source.tensors, source.adapter) if isinstance(reader, CheckpointReader)]
    tables: dict[str, dict[str, Any]] = {
        "run": {"dir": plain.run.dir},
        "model": dict(source.model),
        "data": {"tokenizer": plain.data.tokenizer},
        "train": {"precision": plain.train.precision, "seq_length": plain.train.seq_length},
    }
    for reader in readers:
        recipe = recipe_of(reader)
        for section, fields in (("data", ("tokenizer", "document_mask")), ("train", ("precision", "seq_length"))):
            known = recipe.get(section, {})
            tables[section] |= {name: known[name] for name in fields if known.get(name) not in (None, "")}
    if plain.data.tokenizer:
        tables["data"]["tokenizer"] = plain.data.tokenizer
    return build_config(tables)
