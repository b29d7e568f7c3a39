"""Writing a checkpoint from one process, tensor by tensor in bounded memory, for conversion."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from megalite.checkpoint.checksum import newest
from megalite.checkpoint.directory import commit, prepare, remove
from megalite.checkpoint.manifest import WEIGHT, Index, Manifest, Piece, add_piece, piece_key
from megalite.checkpoint.tensor_file import DTYPE_NAMES, write_durably, write_tensor_file
from megalite.errors import UserError


class CheckpointWriter:
    """Streams tensors into a new checkpoint directory; a context manager.

    The directory gets its final name when the block ends without an exception and the pieces tile every tensor; after
    an exception nothing is left behind. About `shard_bytes` of tensors are held in memory at most.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        step: int,
        model: Mapping[str, Any],
        state: Mapping[str, Any],
        shard_bytes: int = 1 << 30,
    ) -> None:
        self.directory = Path(directory)
        if os.path.lexists(self.directory):
            raise UserError(f"{self.directory} exists already; give a new directory, or remove it first")
        self._shard_bytes = shard_bytes
        self._index: Index = {}
        self._manifest = Manifest(step, 0, dict(state), dict(model), {}, {}, self._index, newest())
        self._waiting: list[tuple[str, str, tuple[int, ...], tuple[int, ...], Tensor]] = []
        self._partial = prepare(self.directory)

    def add(
        self,
        name: str,
        tensor: Tensor,
        *,
        shape: Sequence[int] | None = None,
        offset: Sequence[int] | None = None,
        kind: str = WEIGHT,
    ) -> None:
        """Add a tensor (fp32, bf16 or fp16), or a box of it at `offset`, of the global `shape`. The caller must not
        change it before the block ends."""
        whole = tuple(tensor.shape) if shape is None else tuple(shape)
        start = (0,) * tensor.dim() if offset is None else tuple(offset)
        self._waiting.append((kind, name, whole, start, tensor.detach().cpu().contiguous()))
        if sum(entry[-1].nbytes for entry in self._waiting) >= self._shard_bytes:
            self._flush()

    def add_file(self, name: str, content: bytes) -> None:
        """Add a further file under a plain name: `config.toml`, `tokenizer.model`, `tokenizer.json`, …"""
        write_durably(self._partial / name, content)
        self._manifest.extras[name] = (len(content), self._manifest.checksum(content))

    def _flush(self) -> None:
        if not self._waiting:
            return
        path = self._partial / f"part_{len(self._manifest.files):05d}.safetensors"
        tensors = [(piece_key(kind, name, start), tensor) for kind, name, _, start, tensor in self._waiting]
        written = write_tensor_file(path, tensors, {"format": "pt"}, self._manifest.checksum)
        for (kind, name, whole, start, tensor), checksum in zip(self._waiting, written.tensor_checksums):
            piece = Piece(path.name, start, tuple(tensor.shape), checksum)
            add_piece(self._index, kind, name, whole, DTYPE_NAMES[tensor.dtype], piece)
        self._manifest.files[path.name] = (written.size, written.header_checksum)
        self._waiting.clear()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
                self._manifest.check_tiling(self.directory)
                commit(self._partial, self.directory, self._manifest)
        finally:
            if self._partial.is_dir():
                remove(self._partial)
