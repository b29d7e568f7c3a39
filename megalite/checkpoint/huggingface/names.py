"""Hugging Face directories as a source of weights: any box of any tensor, from one safetensors file or many shards.

The family defines which tensors must exist, and which rows of them are which of megalite's global tensors. A directory
is read directly, in any layout, and only the rows that a rank needs. Nothing in it is trusted; no pickle is loaded.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.huggingface.scorer import causal_config, is_scorer, scorer_tensors
from megalite.checkpoint.huggingface_config import declared_dtype, eos_ids
from megalite.checkpoint.source import Shapes, check_inside, compare_shapes
from megalite.checkpoint.tensor_file import DamagedFile, TensorFile, parse_json, read_regular
from megalite.errors import UserError
from megalite.model.families import FileTensor, Rows, family_of_config
from megalite.placement import Region
from megalite.text.tokenizers import TEMPLATE_FILE

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)

MAX_SMALL_FILE = 1 << 28
"""Upper limit in bytes for files other than weights."""

_CHUNK_BYTES = 1 << 26
_PREFIX = "model."


def is_huggingface(directory: Path) -> bool:
    """Whether a directory is a Hugging Face model: a `config.json` with a `model_type`, and no manifest of megalite."""
    path = directory / CONFIG
    return path.is_file() and not (directory / "manifest.json").exists() and "model_type" in read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the directory; raises UserError."""
    value = parse_json(read_regular(path, MAX_SMALL_FILE), path)
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is not a JSON object: the file is damaged")
    return value


class HuggingFaceSource:
    """The weights of a Hugging Face directory, with the interface of `megalite.checkpoint.source.TensorSource`.

    `family` and `model` come from `config.json`; a reward model has a score in place of the output layer. Tensors are
    stored in fp32, bf16 or fp16. Raises UserError: naming the file, for a missing shard, a truncated or oversized
    header, an index that points outside, or another dtype; naming the tensor, if one is missing, has another shape, or
    is unknown.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        where = str(self.directory / CONFIG)
        self.config = read_json(self.directory / CONFIG)
        self.family = family_of_config(self.config, where)
        self.model = self.family.read_config(causal_config(self.config), where)
        self._declared = declared_dtype(self.config, where)
        self._files: dict[str, TensorFile] = {}
        try:
            places = self._places()
            listed = self.family.tensors_in(self.model, places)
            if is_scorer(self.config):
                listed = scorer_tensors(listed, self.model.hidden_size)
            tensors = {tensor.name: tensor for tensor in listed}
            self._where = self._locate(tensors, places)
            self._check_coverage(tensors)
        except BaseException:
            self.close()
            raise
        self._parts: dict[str, list[tuple[FileTensor, int, Rows]]] = {}
        for tensor in tensors.values():
            for start, rows in tensor.placed_parts():
                self._parts.setdefault(rows.name, []).append((tensor, start, rows))
        self._shapes = {name: parts[0][2].shape for name, parts in self._parts.items()}

    # Locating tensors

    def _locate(self, expected: dict[str, FileTensor], files: dict[str, str]) -> dict[str, tuple[TensorFile, str]]:
        """File and name there of every tensor, by its name in the family; `files` as from `_places`.

        Opens all files, so that nothing is missing later. A model that was saved without its output layer's class has
        names without `model.`.
        """
        places = {name: (self._open(file), name) for name, file in files.items()}
        if any(name.startswith(_PREFIX) for name in places):
            return places
        known = {
            name: _PREFIX + name
            for name in places
            if _PREFIX + name in expected or self.family.ignored.fullmatch(_PREFIX + name)
        }
        return {known.get(name, name): place for name, place in places.items()}

    def _places(self) -> dict[str, str]:
        """The file of every tensor: from the index, or the only file."""
        index, single = self.directory / INDEX, self.directory / SINGLE
        if not os.path.lexists(index):  # a dangling link is a fault, not an absent file
            if os.path.lexists(single):
                return dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
            remedy = f"needed is {SINGLE}, or {INDEX} and its shards"
            if any(self.directory.glob("pytorch_model*.bin")):
                remedy = "its .bin files are pickle, which is never loaded: save it again as safetensors"
            raise UserError(f"{self.directory} holds no weights; {remedy}")
        places = self._weight_map(index)
        if os.path.lexists(single) and set(places.values()) != {SINGLE}:
            raise UserError(f"{self.directory} holds both {SINGLE} and {INDEX}, which names other files; remove one")
        for file in sorted(set(places.values())):
            for name in self._open(file).tensors:
                if places.get(name) != file:
                    raise UserError(f"{self.directory / file} holds {name!r}, which {INDEX} does not put there")
        return places

    def _weight_map(self, index: Path) -> dict[str, str]:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise DamagedFile(f"{index} has no weight_map: the file is damaged")
        for name, file in places.items():
            plain = isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file
            if not plain or Path(file).name != file:
                raise UserError(
                    f"{index}: tensor {name!r} is put in {reprlib.repr(file)}, which is not a plain "
                    "*.safetensors name beside it"
                )
        return places

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            path = self.directory / file
            if not os.path.lexists(path):
                raise UserError(f"{path} is missing, though {INDEX} names it; download the model again")
            self._files[file] = TensorFile(path)
        return self._files[file]

    def _check_coverage(self, tensors: dict[str, FileTensor]) -> None:
        """Check that every tensor of the architecture exists, and nothing else except redundant copies."""
        found = {name: file.entry(stored).shape for name, (file, stored) in self._where.items()}
        ignored = {name for name in found.keys() - tensors.keys() if self.family.ignored.fullmatch(name)}
        found = {name: shape for name, shape in found.items() if name not in ignored}
        for name, original in self.family.copies(self.model).items():
            if name not in found or original not in found:
                continue
            if found.pop(name) != found[original] or not self._equal(name, original):
                raise UserError(
                    f"{self.directory}: by {CONFIG}, {name} is the same as {original}, but the files hold another one; "
                    "set tie_word_embeddings to false, or remove the tensor"
                )
        compare_shapes({name: tensor.shape for name, tensor in tensors.items()}, found, str(self.directory))

    def _equal(self, first: str, second: str) -> bool:
        """Whether two tensors of one shape have the same values."""
        places = (self._where[first], self._where[second])
        shape = places[0][0].entry(places[0][1]).shape
        step = max(1, _CHUNK_BYTES // (4 * max(1, math.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            one, other = (file.read(name, start, min(start + step, shape[0])).float() for file, name in places)
            if not torch.equal(one, other):
                return False
        return True

    # Reading

    def shapes(self) -> Shapes:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """What a global tensor is stored in."""
        file, stored = self._where[self._parts[name][0][0].name]
        return file.entry(stored).dtype

    @property
    def precision(self) -> str:
        """What to compute in: `fp32`, or `bf16` for narrower dtypes; of `config.json`, else of the weights."""
        dtypes = {self._declared} if self._declared is not None else {self.dtype(name) for name in self._shapes}
        return "fp32" if dtypes == {torch.float32} else "bf16"

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` in the stored dtype; reads no row outside it, and at most 64 MiB at a time."""
        shape = self._shapes.get(name)
        if shape is None:
            raise UserError(f"{self.directory} has no tensor {name!r}, which the model of its {CONFIG} needs")
        check_inside(Region(tuple(offset), tuple(size)), name, shape, self.directory)
        box = torch.empty(tuple(size), dtype=self.dtype(name))
        for tensor, start, rows in self._parts[name]:
            first, stop = max(offset[0], rows.first), min(offset[0] + size[0], rows.first + rows.count)
            if first < stop:
                self._fill(box[first - offset[0] : stop - offset[0]], tensor, start + first - rows.first, offset, shape)
        return box

    def _fill(self, box: Tensor, tensor: FileTensor, row: int, offset: Sequence[int], shape: tuple[int, ...]) -> None:
        """Fill `box` with the columns from `offset[1:]` of the file tensor's rows from `row` on."""
        file, stored = self._where[tensor.name]
        entry, columns = file.entry(stored), shape[1:]
        row_bytes = entry.dtype.itemsize * math.prod(columns)
        if box.shape[1:] == columns and box.dtype == entry.dtype:
            file.read_bytes(entry.begin + row * row_bytes, box)
            return
        step = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(0, len(box), step):
            part = box[first : first + step]
            block = torch.empty((len(part), *columns), dtype=entry.dtype)
            file.read_bytes(entry.begin + (row + first) * row_bytes, block)
            for dim, (start, length) in enumerate(zip(offset[1:], part.shape[1:]), 1):
                block = block.narrow(dim, start, length)
            part.copy_(block)

    def eos_ids(self) -> tuple[int, ...] | None:
        """The ids that end a text, as `generation_config.json` or, where that is silent, `config.json` names them."""
        path = self.directory / GENERATION
        chosen = eos_ids(read_json(path), str(path)) if os.path.lexists(path) else None
        return eos_ids(self.config, str(self.directory / CONFIG)) if chosen is None else chosen

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> HuggingFaceSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
