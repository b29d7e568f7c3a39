"""Focal loss (Lin et al. 2017, arXiv:1708.02002): tokens that the model is sure of count less.

[objective]
kind = "focal_loss:FocalLoss"
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.objective import Outputs, Reads

GAMMA = 2.0


class FocalLoss:
    """-(1 - p)^GAMMA log p, averaged over the tokens that count; `p` in the metrics is their mean probability."""

    reads: Reads = "logprobs"
    metrics: tuple[str, ...] = ("p",)

    def units(self, batch: Batch) -> Tensor:
        return (batch.labels_BS != IGNORE_INDEX).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.logprobs_BS is not None
        counts_BS = batch.labels_BS != IGNORE_INDEX
        p_BS = outputs.logprobs_BS.exp()
        loss_BS = -((1 - p_BS) ** GAMMA) * outputs.logprobs_BS  # 0 where the label is ignored
        loss = loss_BS.sum(dtype=torch.float64) * scale
        return loss, {"p": (p_BS.detach() * counts_BS).sum(dtype=torch.float64) * scale}
