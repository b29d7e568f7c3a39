"""Pretraining: mean next-token loss over all labels that are not ignored."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megalite.data.batch import Batch
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.objective import Outputs, Reads


class NextToken:
    """Reads the fused loss of the head, which turns logits into their gradient as soon as they are computed."""

    reads: Reads = "loss"
    metrics: tuple[str, ...] = ()

    def units(self, batch: Batch) -> Tensor:
        return (batch.labels_BS != IGNORE_INDEX).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.loss is not None
        return outputs.loss, {}


NEXT_TOKEN = NextToken()
