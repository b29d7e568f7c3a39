"""Loss on a token file: every token once, in the file's order, in consecutive windows of one length.

No shuffling and no epochs, unlike training's samples, so that the number means the same for every seed. The first
token of a window but the first has been predicted by the window before; the last window may be shorter.

S window length, B micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.data.batches import Batches
from megalite.data.indexed import IndexedDataset
from megalite.data.rows import Row, fill_shifted
from megalite.errors import UserError
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.model.decoder import Stage
from megalite.model.sharded import ShardedModel
from megalite.text.tokenizers import Tokenizer

_GROUP = 16
"""Micro-batches that go through the pipeline together."""


@dataclass(frozen=True)
class Score:
    """Sum of the token losses in nats, over `tokens` predicted tokens of `samples` windows."""

    total: float
    tokens: int
    samples: int

    @property
    def loss(self) -> float:
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """The loss per byte of the text, which does not depend on the tokenizer."""
        return self.total / math.log(2) / text_bytes


class Windows:
    """Window k of a token file is its tokens [k S, k S + S], the last of which is only a label."""

    separate = False
    columns: tuple[str, ...] = ()

    def __init__(self, file: IndexedDataset, seq_length: int, vocab_size: int, max_samples: int | None = None) -> None:
        if file.tokens.size < 2:
            raise UserError(f"{file.prefix}: {file.tokens.size} tokens are too few to predict one")
        self.file, self.seq_length, self._vocab_size = file, seq_length, vocab_size
        windows = -(-(file.tokens.size - 1) // seq_length)
        self.samples = windows if max_samples is None else min(windows, max_samples)
        starts = np.append(file.offsets // file.dtype.itemsize, file.tokens.size)
        self._documents = starts[file.boundaries[:-1]]

    def __len__(self) -> int:
        return self.samples

    @property
    def whole(self) -> bool:
        """Whether the windows cover the file."""
        return self.samples * self.seq_length >= self.file.tokens.size - 1

    def ids(self, number: int) -> np.ndarray:
        """The tokens of a window, [up to S + 1]. Raises UserError for one that the model does not know."""
        start = number * self.seq_length
        ids = self.file.tokens[start : start + self.seq_length + 1].astype(np.int64)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            bad = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise UserError(
                f"{self.file.prefix}.bin: token id {bad} among tokens {start} to {start + len(ids) - 1}; the model has "
                f"model.vocab_size = {self._vocab_size}: tokenize with the model's tokenizer"
            )
        return ids

    def fill(self, number: int, row: Row) -> None:
        """Write window `number`; see `megalite.data.rows.Rows`."""
        fill_shifted(self.read, number, row)

    def read(self, number: int, tokens: np.ndarray, positions: np.ndarray, documents: np.ndarray) -> None:
        """Fill int64 rows of S + 1; see `megalite.data.dataset.TokenDataset.read`."""
        ids = self.ids(number)
        tokens[: len(ids)], tokens[len(ids) :] = ids, IGNORE_INDEX
        if positions.size:
            places = number * self.seq_length + np.arange(self.seq_length + 1)
            documents[:] = np.searchsorted(self._documents, places, side="right") - 1
            first = np.maximum(self._documents[documents], number * self.seq_length)
            positions[:] = places - first


def score(windows: Windows, model: ShardedModel, *, micro_batch_size: int = 4, document_mask: bool = False) -> Score:
    """The loss over all windows; every rank of the mesh calls it alike, and gets the same.

    Data-parallel ranks share the windows out.
    """
    mesh = model.mesh
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    block = micro_batch_size * mesh.samples_size * _GROUP
    batches = Batches(
        windows,
        micro_batch_size=micro_batch_size,
        dp_rank=mesh.samples_index,
        dp_size=mesh.samples_size,
        device=mesh.device,
        document_mask=document_mask,
    )
    with batches:
        for first in range(0, len(windows), block):
            part = batches.next_batch(first, min(block, len(windows) - first))
            losses = model.run(part, _loss, shape=(micro_batch_size, windows.seq_length))
            if losses and mesh.index("tp") == 0:  # tensor ranks hold the same sums
                total[0] += torch.stack(list(losses.values())).sum()
                if mesh.index("cp") == 0:  # each has the loss of its own tokens, and all have the whole batch
                    total[1] += sum(int((batch.labels_BS != IGNORE_INDEX).sum()) for batch in part)
    mesh.world.all_reduce(total).wait()
    nats, tokens = total.tolist()
    return Score(nats, int(tokens), len(windows))


def _loss(stage: Stage, hidden: Tensor, batch: Batch, micro: int) -> Tensor:
    return stage.loss(hidden, batch.labels_BS, 1.0)


def count_bytes(windows: Windows, tokenizer: Tokenizer | None) -> tuple[int, str] | None:
    """(UTF-8 bytes of the predicted text, source of the count), or None if nothing tells.

    For a whole file, `PREFIX.json` of tools/preprocess_data.py knows the bytes of the text; a part of one is decoded
    by the tokenizer, window by window, in which a character cut by a window's end counts as the three bytes of U+FFFD.
    """
    described = windows.file.description().get("text_bytes")
    if windows.whole and type(described) is int and described > 0:
        return described, "json"
    if tokenizer is None:
        return None
    texts = (tokenizer.decode(windows.ids(number)[1:]) for number in range(len(windows)))
    count = sum(len(text.encode()) for text in texts)
    return (count, "tokenizer") if count else None
