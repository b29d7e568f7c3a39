"""A micro-batch: the input of the model and of an objective.

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
        tokens_BS: input ids; 0 for padding.
        labels_BS: the next token of each; `IGNORE_INDEX` (-100) where it does not count in the loss.
        positions_BS: position of each token in its document; with document masks only.
        documents_BS: number of its document within the sequence, from 0; with document masks only.
        columns: further per-token numbers for an objective, fp32 [B, S], by name.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor | None = None
    documents_BS: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy is asynchronous."""
        parts = (self.tokens_BS, self.labels_BS, self.positions_BS, self.documents_BS)
        tokens, labels, *places = [None if part is None else part.to(device, non_blocking=True) for part in parts]
        assert tokens is not None and labels is not None
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        positions, documents = places
        return Batch(tokens, labels, positions, documents, columns)
