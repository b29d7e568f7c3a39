"""A micro-batch: what the model and an objective read.

B samples of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, int64 [B, S].

    Attributes:
        tokens_BS: input ids; 0 where there is none.
        labels_BS: the next token of each; `IGNORE_INDEX` (-100) where the loss leaves it out.
        positions_BS: place of each token in its document, with document masks only.
        documents_BS: number of its document within the sequence, from 0, with document masks only.
        columns: further numbers for each token that an objective reads, fp32 [B, S], by name.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor | None = None
    documents_BS: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy runs beside the computation."""
        parts = (self.tokens_BS, self.labels_BS, self.positions_BS, self.documents_BS)
        tokens, labels, *places = [None if part is None else part.to(device, non_blocking=True) for part in parts]
        assert tokens is not None and labels is not None
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        positions, documents = places
        return Batch(tokens, labels, positions, documents, columns)
