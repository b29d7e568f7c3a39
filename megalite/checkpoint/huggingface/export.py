"""From a megalite checkpoint to a Hugging Face directory, a few hundred MiB at a time.

The files are laid out as the safetensors library writes them (larger dtypes first, then by name), so that a model that
came from Hugging Face and goes back is the same bytes. Everything appears at once, under the final name, or not at all.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import sentencepiece
import torch

from megalite.checkpoint.directory import CHECKPOINTS
from megalite.checkpoint.files import (
    DTYPES,
    safetensors_header,
    sync_directory,
    tensor_bytes,
    write_durably,
)
from megalite.checkpoint.huggingface.config import DTYPE_FIELDS, huggingface_config, model_config_from_huggingface
from megalite.checkpoint.huggingface.names import (
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    read_json,
)
from megalite.checkpoint.manifest import WEIGHT
from megalite.checkpoint.source import CheckpointReader, compare_shapes, model_shapes
from megalite.config import ModelConfig, build_config
from megalite.errors import UserError
from megalite.text.tokenizers import Tokenizer, load_tokenizer

KEPT = "huggingface"
"""Folder of a run directory that keeps the small files of the model it was imported from."""

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BLOCK_BYTES = 1 << 28

_FILE_ORDER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Progress = Callable[[str, int, int], None]
"""(what was just written, bytes so far, bytes in all)."""


@dataclass(frozen=True)
class Export:
    """What was written: tensors, bytes of weights, files that hold them."""

    tensors: int
    weight_bytes: int
    files: tuple[str, ...]


@contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """A directory to fill, beside `final`, whose name it takes when the block ends without an exception."""
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists already; give a new directory, or remove it first")
    partial = final.with_name(final.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_directory(partial)
        partial.rename(final)
        sync_directory(final.parent)
    except OSError as error:
        raise UserError(f"{final}: {error.strerror}; make room, or choose another place") from None
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def export_huggingface(
    reader: CheckpointReader,
    directory: Path,
    dtype: str = "auto",
    shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Export:
    """Write `directory` (new, or empty) from a checkpoint. Raises UserError.

    `dtype`: `float32`, `bfloat16`, `float16`, or `auto`: what the run computes in, and of weights that were imported
    and never trained, what they came in. More than `shard_bytes` of weights make several files and an index.
    """
    model = build_config({"model": reader.manifest.model}).model
    shapes = model_shapes(model)
    compare_shapes(shapes, reader.shapes(), str(reader.directory))
    dtypes = _dtypes(reader, dtype)
    files = _assign({name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}, shard_bytes)
    total = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
    with appearing(directory) as partial:
        meter = _Meter(progress, total)
        for file, names in files.items():
            _write_weights(partial / file, reader, names, dtypes, meter)
        if len(files) > 1:
            places = {name: file for file, names in files.items() for name in names}
            size = {"total_parameters": sum(map(math.prod, shapes.values())), "total_size": total}
            write_durably(partial / INDEX, _json_file({"metadata": size, "weight_map": places}))
        for name, content in _small_files(reader, model, dtypes).items():
            write_durably(partial / name, content)
    return Export(len(shapes), total, tuple(files))


def _json_file(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _dtypes(reader: CheckpointReader, wanted: str) -> dict[str, torch.dtype]:
    """The dtype to write each tensor in."""
    stored = {name: DTYPES[entry.dtype] for name, entry in reader.manifest.index[WEIGHT].items()}
    if wanted != "auto":
        by_name = {name: dtype for dtype, name in NAMES.items()}
        if wanted not in by_name:
            raise UserError(f"dtype {wanted!r} is not one of auto, {', '.join(by_name)}")
        return dict.fromkeys(stored, by_name[wanted])
    if reader.manifest.step == 0:
        return stored
    precision = recipe_of(reader).get("train", {}).get("precision", "fp32")
    return dict.fromkeys(stored, torch.float32 if precision == "fp32" else torch.bfloat16)


def recipe_of(reader: CheckpointReader) -> dict[str, Any]:
    """The recipe that the checkpoint carries, or nothing."""
    if "config.toml" not in reader.manifest.extras:
        return {}
    return tomllib.loads(reader.extra("config.toml").decode("utf-8"))


def _assign(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, filled one file after the other in the order of the model."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


@dataclass
class _Meter:
    """Reports progress in bytes."""

    progress: Progress | None
    total: int
    done: int = 0

    def add(self, what: str, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(what, self.done, self.total)


def _write_weights(
    path: Path, reader: CheckpointReader, names: Sequence[str], dtypes: Mapping[str, torch.dtype], meter: _Meter
) -> None:
    """One safetensors file, streamed and synced."""
    shapes = reader.shapes()
    ordered = sorted(names, key=lambda name: (_FILE_ORDER[dtypes[name]], name))
    with open(path, "xb") as file:
        file.write(safetensors_header([(name, dtypes[name], shapes[name]) for name in ordered], {"format": "pt"}))
        for name in ordered:
            for count in _write_tensor(file, reader, name, dtypes[name]):
                meter.add(name, count)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, reader: CheckpointReader, name: str, dtype: torch.dtype) -> Iterator[int]:
    shape = reader.shapes()[name]
    for start, stop in row_blocks(reader, name):
        offset, size = (start, *(0,) * (len(shape) - 1)), (stop - start, *shape[1:])
        block = reader.read(name, offset, size).to(dtype).contiguous()
        yield file.write(tensor_bytes(block))


def row_blocks(reader: CheckpointReader, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) that cut no stored piece, so that none is read twice; at most about `block_bytes` each."""
    entry = reader.manifest.index[WEIGHT][name]
    row_bytes = math.prod(entry.shape[1:]) * DTYPES[entry.dtype].itemsize
    edges, reach = [], 0
    for first, rows in sorted((piece.offset[0], piece.size[0]) for piece in entry.pieces):
        if first >= reach > 0:
            edges.append(reach)
        reach = max(reach, first + rows)
    start = stop = 0
    for edge in (*edges, reach):
        if (edge - start) * row_bytes > block_bytes and stop > start:
            yield start, stop
            start = stop
        stop = edge
    yield start, stop


def _small_files(reader: CheckpointReader, model: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> dict[str, bytes]:
    """`config.json` and the tokenizer: those the run was imported with, as far as they still fit, or new ones."""
    kept = _kept_files(reader)
    dtype = NAMES[next(iter(dtypes.values()))]
    files = {name: content for name, content in kept.items() if name != CONFIG}
    if not any(name in files for name in TOKENIZER_FILES[:2]):
        files |= _tokenizer_files(reader)
    original = json.loads(kept[CONFIG]) if CONFIG in kept else None
    if original is not None and model_config_from_huggingface(original, f"{KEPT}/{CONFIG}") == model:
        fields = [field for field in DTYPE_FIELDS if field in original]
        if all(original[field] == dtype for field in fields):
            return files | {CONFIG: kept[CONFIG]}
        return files | {CONFIG: _json_file(original | dict.fromkeys(fields or DTYPE_FIELDS[:1], dtype))}
    return files | {CONFIG: _json_file(huggingface_config(model, dtype, _special_ids(reader)))}


def _kept_files(reader: CheckpointReader) -> dict[str, bytes]:
    folder = reader.directory.parent
    folder = (folder.parent if folder.name == CHECKPOINTS else folder) / KEPT
    wanted = (CONFIG, GENERATION, *TOKENIZER_FILES)
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}


def _tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    chosen = reader.tokenizer or recipe_of(reader).get("data", {}).get("tokenizer", "")
    return load_tokenizer(chosen) if chosen and (str(chosen) == "byte" or Path(chosen).exists()) else None


def _tokenizer_files(reader: CheckpointReader) -> dict[str, bytes]:
    """The tokenizer that the checkpoint carries, under the names that transformers looks for."""
    tokenizer = _tokenizer(reader)
    if tokenizer is None or not tokenizer.files:
        return {}
    if tokenizer.kind == "huggingface":
        return {path.name: path.read_bytes() for path in tokenizer.files}
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": _puts_space_first(tokenizer.files[0]),
        "bos_token": "<s>" if tokenizer.bos is not None else None,
        "eos_token": "</s>" if tokenizer.eod is not None else None,
        "unk_token": "<unk>",
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    return {"tokenizer.model": tokenizer.files[0].read_bytes(), "tokenizer_config.json": _json_file(settings)}


def _puts_space_first(path: Path) -> bool:
    """Whether this sentencepiece model begins every text with a space of its own."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("x", out_type=str)
    return pieces[0].startswith("▁")


def _special_ids(reader: CheckpointReader) -> dict[str, int]:
    tokenizer = _tokenizer(reader)
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}
    return {name: number for name, number in ids.items() if number is not None}


def kept_json(directory: Path) -> dict[str, bytes]:
    """The small files of a Hugging Face directory that are worth keeping, checked to be what they should be."""
    files = {}
    for name in (CONFIG, GENERATION, *TOKENIZER_FILES):
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".json" and name not in ("tokenizer.json", "vocab.json"):
            read_json(path)
        files[name] = path.read_bytes()
    return files
