"""Export of a megalite checkpoint to a Hugging Face directory, a few hundred MiB at a time.

The files are laid out as the safetensors library writes them (larger dtypes first, then by name), so that a round trip
from and to Hugging Face is byte-identical. The directory appears atomically under its final name, or not at all.
"""

from __future__ import annotations

import json
import math
import os
import secrets
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
from megalite.checkpoint.huggingface.names import (
    CONFIG,
    GENERATION,
    INDEX,
    MAX_SMALL_FILE,
    SINGLE,
    TOKENIZER_FILES,
    read_json,
)
from megalite.checkpoint.huggingface.scorer import (
    as_critic,
    causal_config,
    is_scorer,
    scorer_config,
    scorer_tensors,
)
from megalite.checkpoint.huggingface_config import (
    DTYPE_FIELDS,
    NAMES,
    huggingface_config,
    model_config_from_huggingface,
)
from megalite.checkpoint.manifest import WEIGHT
from megalite.checkpoint.source import CheckpointReader, compare_shapes
from megalite.checkpoint.tensor_file import (
    DTYPES,
    parse_json,
    read_regular,
    safetensors_header,
    tensor_bytes,
)
from megalite.config import ModelConfig, build_config
from megalite.errors import UserError
from megalite.files import TEMPORARY_SUFFIX, atomic_file, sync_directory, write_atomically, write_errors_named
from megalite.model.decoder import CRITIC, SCORE
from megalite.model.families import FileTensor, Rows, family_of_model
from megalite.text.tokenizers import TEMPLATE_FILE, Tokenizer, load_tokenizer

KEPT = "huggingface"
"""Folder in a run directory with the small files of the model it was imported from."""

BLOCK_BYTES = 1 << 28

_FILE_ORDER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Progress = Callable[[str, int, int], None]
"""(what was just written, bytes so far, total bytes)."""


@dataclass(frozen=True)
class Export:
    """What was written: tensors, bytes of weights, files that hold them."""

    tensors: int
    weight_bytes: int
    files: tuple[str, ...]


@contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """A temporary directory beside `final`, renamed to it when the block ends without an exception."""
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} exists already; give a new directory, or remove it first")
    with write_errors_named(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        # A unique name, so that nothing of anyone else's is in the way or removed.
        partial = final.with_name(f".{final.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
        partial.mkdir()
        try:
            yield partial
            sync_directory(partial)
            partial.rename(final)
            sync_directory(final.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def export_huggingface(
    reader: CheckpointReader,
    directory: Path,
    dtype: str = "auto",
    shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
    *,
    role: str = "policy",
    stacked_experts: bool = False,
) -> Export:
    """Write `directory` (new, or empty) from a checkpoint. Raises UserError.

    A reward model becomes a `...ForSequenceClassification`, and so does the critic beside a policy, with `role`
    "critic".

    `dtype`: `float32`, `bfloat16`, `float16`, or `auto`: the run's precision, or, for imported weights that were never
    trained, their original dtype. More than `shard_bytes` of weights are split into several files with an index.
    `stacked_experts` writes all experts of a layer as one tensor, as transformers 5 holds them in memory.
    """
    model = build_config({"model": reader.manifest.model}).model
    kept = files_beside(reader)
    original = parse_json(kept[CONFIG], Path(KEPT) / CONFIG) if CONFIG in kept else {}
    family = family_of_model(model, original.get("model_type", ""))
    if stacked_experts and (family.stacked_tensors is None or not model.experts):
        raise UserError(f"{reader.directory} has no experts that could be stacked; leave out --stacked-experts")
    listed = family.stacked_tensors if stacked_experts and family.stacked_tensors else family.tensors
    tensors = list(listed(model))
    scores = role == "critic" or SCORE in reader.shapes()
    if scores:
        tensors = list(scorer_tensors(tensors, model.hidden_size))
    if role == "critic":
        tensors = list(as_critic(tensors))
    expected = {rows.name: rows.shape for tensor in tensors for rows in tensor.parts}
    found = {name: shape for name, shape in reader.shapes().items() if name.startswith(CRITIC) == (role == "critic")}
    compare_shapes(expected, found, str(reader.directory), what=family.architectures[0])
    dtypes = _dtypes(reader, tensors, dtype)
    sizes = {tensor.name: math.prod(tensor.shape) * dtypes[tensor.name].itemsize for tensor in tensors}
    files, total = _assign(sizes, shard_bytes), sum(sizes.values())
    as_imported = dtype == "auto" and reader.manifest.step == 0
    config = _config_file(reader, model, kept.get(CONFIG), NAMES[dtypes[tensors[0].name]], as_imported=as_imported)
    if scores and not is_scorer(original):
        config = _json_file(scorer_config(parse_json(config, Path(CONFIG))))
    small = _small_files(reader, kept) | {CONFIG: config}
    with appearing(directory) as partial:
        writer = _WeightWriter(reader, {tensor.name: tensor for tensor in tensors}, dtypes, progress, total)
        for file, names in files.items():
            writer.write(partial / file, names)
        if len(files) > 1:
            places = {name: file for file, names in files.items() for name in names}
            size = {"total_parameters": sum(math.prod(tensor.shape) for tensor in tensors), "total_size": total}
            write_atomically(partial / INDEX, _json_file({"metadata": size, "weight_map": places}))
        for name, content in small.items():
            write_atomically(partial / name, content)
    return Export(len(tensors), total, tuple(files))


def _json_file(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _dtypes(reader: CheckpointReader, tensors: Sequence[FileTensor], wanted: str) -> dict[str, torch.dtype]:
    """The dtype to write each tensor of the files in."""
    wide = {tensor.name: torch.float32 for tensor in tensors if tensor.fp32}
    stored = {name: DTYPES[entry.dtype] for name, entry in reader.manifest.index[WEIGHT].items()}
    if wanted != "auto":
        by_name = {name: dtype for dtype, name in NAMES.items()}
        if wanted not in by_name:
            raise UserError(f"dtype {wanted!r} is not one of auto, {', '.join(by_name)}")
        return dict.fromkeys((tensor.name for tensor in tensors), by_name[wanted]) | wide
    if reader.manifest.step == 0:
        wide = {}  # imported weights keep their own dtype
    else:
        precision = recipe_of(reader).get("train", {}).get("precision", "fp32")
        stored = dict.fromkeys(stored, torch.float32 if precision == "fp32" else torch.bfloat16)
    return {tensor.name: stored[tensor.parts[0].name] for tensor in tensors} | wide


def recipe_of(reader: CheckpointReader) -> dict[str, Any]:
    """The checkpoint's recipe; empty if it has none."""
    if "config.toml" not in reader.manifest.extras:
        return {}
    return tomllib.loads(reader.extra("config.toml").decode("utf-8"))


def _assign(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, filling one file after the other in the order of the model."""
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
class _WeightWriter:
    """Writes safetensors files from a checkpoint, block by block; `progress` gets `done` and `total` bytes."""

    reader: CheckpointReader
    tensors: Mapping[str, FileTensor]
    dtypes: Mapping[str, torch.dtype]
    progress: Progress | None
    total: int
    done: int = 0

    def write(self, path: Path, names: Sequence[str]) -> None:
        """One file with these tensors, streamed and synced."""
        ordered = sorted(names, key=lambda name: (_FILE_ORDER[self.dtypes[name]], name))
        entries = [(name, self.dtypes[name], self.tensors[name].shape) for name in ordered]
        with atomic_file(path) as file:
            file.write(safetensors_header(entries, {"format": "pt"}))
            for name in ordered:
                for rows in self.tensors[name].parts:
                    self._write_rows(file, name, rows)

    def _write_rows(self, file: BinaryIO, name: str, rows: Rows) -> None:
        for first, last in row_blocks(self.reader, rows.name):
            start, stop = max(first, rows.first), min(last, rows.first + rows.count)
            if start >= stop:
                continue
            offset, size = (start, *(0,) * (len(rows.shape) - 1)), (stop - start, *rows.shape[1:])
            block = self.reader.read(rows.name, offset, size).to(self.dtypes[name]).contiguous()
            self.done += file.write(tensor_bytes(block))
            if self.progress is not None:
                self.progress(name, self.done, self.total)


def row_blocks(reader: CheckpointReader, name: str, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) that split no stored piece, so that none is read twice; about `block_bytes` each at most."""
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


def _config_file(
    reader: CheckpointReader, model: ModelConfig, kept: bytes | None, dtype: str, *, as_imported: bool
) -> bytes:
    """`config.json`: the imported one if it still describes the model, else a new one with its other fields.

    `dtype` is the dtype the weights are written in; `as_imported`, the imported file's own value is kept.
    """
    original = {} if kept is None else parse_json(kept, Path(KEPT) / CONFIG)
    beside = _special_ids(reader) | original
    written = huggingface_config(model, dtype, beside, preferred=original.get("model_type", ""))
    if kept is None or model_config_from_huggingface(causal_config(original), f"{KEPT}/{CONFIG}") != model:
        return _json_file(written)
    stale = [field for field in DTYPE_FIELDS if not as_imported and original.get(field) not in (None, dtype)]
    changed: dict[str, Any] = dict.fromkeys(stale, dtype)
    if causal_config(original).get("architectures") not in (None, written["architectures"]):
        changed["architectures"] = written["architectures"]  # imported without the class of the output layer
    return _json_file({**original, **changed}) if changed else kept


def _small_files(reader: CheckpointReader, kept: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer, its chat template and the other small files of the imported model."""
    files = {name: content for name, content in kept.items() if name != CONFIG}
    if any(name in files for name in TOKENIZER_FILES[:2]):
        return files | _template(reader)
    return files | tokenizer_files(reader)


def _template(reader: CheckpointReader) -> dict[str, bytes]:
    return {TEMPLATE_FILE: reader.extra(TEMPLATE_FILE)} if TEMPLATE_FILE in reader.manifest.extras else {}


def files_beside(reader: CheckpointReader) -> dict[str, bytes]:
    folder = reader.directory.parent
    return kept_files((folder.parent if folder.name == CHECKPOINTS else folder) / KEPT)


def _tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    chosen = reader.tokenizer or recipe_of(reader).get("data", {}).get("tokenizer", "")
    return load_tokenizer(chosen) if chosen and (str(chosen) == "byte" or Path(chosen).exists()) else None


def tokenizer_files(reader: CheckpointReader) -> dict[str, bytes]:
    """The checkpoint's tokenizer and chat template, under the file names that transformers expects."""
    tokenizer = _tokenizer(reader)
    if tokenizer is None or not tokenizer.files:
        return _template(reader)
    if tokenizer.kind == "huggingface":
        return {path.name: path.read_bytes() for path in tokenizer.files} | _template(reader)
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
    files = {"tokenizer.model": tokenizer.files[0].read_bytes(), "tokenizer_config.json": _json_file(settings)}
    return files | _template(reader)


def _puts_space_first(path: Path) -> bool:
    """Whether this sentencepiece model prepends a space to every text."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("x", out_type=str)
    return pieces[0].startswith("▁")


def _special_ids(reader: CheckpointReader) -> dict[str, int]:
    tokenizer = _tokenizer(reader)
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}
    return {name: number for name, number in ids.items() if number is not None}


def kept_files(directory: Path) -> dict[str, bytes]:
    """The small files of a Hugging Face directory that are worth keeping, validated."""
    files = {}
    for name in (CONFIG, GENERATION, *TOKENIZER_FILES):
        path = directory / name
        if not os.path.lexists(path):
            continue
        if path.suffix == ".json" and name not in ("tokenizer.json", "vocab.json"):
            read_json(path)
        files[name] = read_regular(path, MAX_SMALL_FILE)
    return files
