"""Hugging Face directories as a source of weights: any box of any tensor, from one safetensors file or many shards.

megalite's global names are those of Hugging Face's Llama checkpoints, so that nothing is renamed: a directory is read
as it lies, in any layout, and only the rows that a rank needs. Nothing in it is trusted; no pickle is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.files import DamagedFile, TensorFile, parse_json
from megalite.checkpoint.huggingface.config import model_config_from_huggingface
from megalite.checkpoint.source import Shapes
from megalite.errors import UserError
from megalite.model.decoder import OUTPUT

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
    "chat_template.jinja",
)

_MAX_JSON = 1 << 28
_CHUNK_BYTES = 1 << 26


def is_huggingface(directory: Path) -> bool:
    """Whether a directory is a Hugging Face model: a `config.json` with a `model_type`, and no manifest of megalite."""
    path = directory / CONFIG
    return path.is_file() and not (directory / "manifest.json").exists() and "model_type" in read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the directory; raises UserError."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise DamagedFile(f"{path} has {path.stat().st_size} bytes, more than any such file needs")
        value = parse_json(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a Hugging Face model directory") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is not a JSON object: the file is damaged")
    return value


class HuggingFaceSource:
    """The weights of a Hugging Face directory, with the interface of `megalite.checkpoint.source.TensorSource`.

    `model` is what `config.json` describes. Tensors are stored in fp32, bf16 or fp16. Raises UserError, naming the
    file, for a missing shard, a truncated or oversized header, an index that points outside, another dtype.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config = read_json(self.directory / CONFIG)
        self.model = model_config_from_huggingface(self.config, str(self.directory / CONFIG))
        self._files: dict[str, TensorFile] = {}
        self._where = self._locate()
        self._shapes = {name: self._files[file].entry(name).shape for name, file in self._where.items()}

    def _locate(self) -> dict[str, str]:
        """The file of every tensor that belongs to the model; opens all of them, so that nothing is missing later."""
        index = self.directory / INDEX
        if index.exists():
            places = self._weight_map(index)
        elif (self.directory / SINGLE).exists():
            places = dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
        else:
            remedy = f"needed is {SINGLE}, or {INDEX} and its shards"
            if any(self.directory.glob("pytorch_model*.bin")):
                remedy = "its .bin files are pickle, which is never loaded: save it again as safetensors"
            raise UserError(f"{self.directory} holds no weights; {remedy}")
        for file in sorted(set(places.values())):
            self._open(file)
        # Old exports carry the rotary frequencies, and tied models the output layer a second time.
        redundant = (OUTPUT,) if self.model.tie_embeddings else ()
        return {
            name: file
            for name, file in places.items()
            if name not in redundant and not name.endswith(".rotary_emb.inv_freq")
        }

    def _weight_map(self, index: Path) -> dict[str, str]:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise DamagedFile(f"{index} has no weight_map: the file is damaged")
        for name, file in places.items():
            plain = isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file
            if not plain or Path(file).name != file:
                raise UserError(
                    f"{index}: tensor {name!r} is put in {file!r}, which is not a plain *.safetensors name beside it"
                )
        return places

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            path = self.directory / file
            if not path.exists():
                raise UserError(f"{path} is missing, though {INDEX} names it; download the model again")
            self._files[file] = TensorFile(path)
        return self._files[file]

    def shapes(self) -> Shapes:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return self._files[self._where[name]].entry(name).dtype

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` in the stored dtype; reads no row outside it, and at most 64 MiB at a time."""
        if name not in self._where:
            raise UserError(f"{self.directory} has no tensor {name!r}, which the model of its {CONFIG} needs")
        file = self._files[self._where[name]]
        entry = file.entry(name)
        if len(offset) != len(entry.shape) or any(
            start < 0 or start + length > extent for start, length, extent in zip(offset, size, entry.shape)
        ):
            raise UserError(
                f"{file.path}: {name} has shape {list(entry.shape)}, which has no box of {list(size)} at {list(offset)}"
            )
        if tuple(size[1:]) == entry.shape[1:]:
            return file.read(name, offset[0], offset[0] + size[0])
        box = torch.empty(tuple(size), dtype=entry.dtype)
        step = max(1, _CHUNK_BYTES // (math.prod(entry.shape[1:]) * entry.dtype.itemsize))
        for first in range(0, size[0], step):
            rows = box[first : first + step]
            whole = file.read(name, offset[0] + first, offset[0] + first + len(rows))
            for dim, (start, length) in enumerate(zip(offset[1:], size[1:]), 1):
                whole = whole.narrow(dim, start, length)
            rows.copy_(whole)
        return box

    def special_ids(self) -> Mapping[str, Any]:
        """The bos, eos and pad ids that `config.json` (or, before it, `generation_config.json`) gives."""
        generation = read_json(self.directory / GENERATION) if (self.directory / GENERATION).is_file() else {}
        merged = {**self.config, **{key: value for key, value in generation.items() if value is not None}}
        return {
            key: merged[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if merged.get(key) is not None
        }

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> HuggingFaceSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
