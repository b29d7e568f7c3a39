"""Objectives on pairs of answers: a reward model (Bradley-Terry), DPO and IPO.

In each row of a batch, documents 2p and 2p + 1 are the chosen and the rejected answer of a pair. The column `ends` is 1
at the last token of each answer, and 0 elsewhere (also in padding, which is a document of its own).

B micro-batch, S sequence, D documents of a row (at most), P = D / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.objective import Outputs, Reads

REFERENCE = "reference"
"""Column with the reference model's log-probability of each label."""


def by_document(x_BS: Tensor, batch: Batch) -> Tensor:
    """Sums over the documents of each row: fp64 [B, D], D even and at least the number of documents in any row.

    No more documents than tokens fit in a row, so the shape does not depend on the data.
    """
    assert batch.documents_BS is not None
    rows, length = x_BS.shape
    documents = length + length % 2
    first_B1 = torch.arange(rows, device=x_BS.device).unsqueeze(1) * documents
    sums = torch.zeros(rows * documents, dtype=torch.float64, device=x_BS.device)
    sums = sums.index_add(0, (batch.documents_BS + first_B1).flatten(), x_BS.double().flatten())
    return sums.view(rows, documents)


def pairs(x_BS: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sums over the chosen and over the rejected answer of each pair: fp64 [B, P] each; 0 if there is no pair."""
    sums_BP2 = by_document(x_BS, batch).unflatten(1, (-1, 2))
    there_BP = is_pair(batch)
    return sums_BP2[..., 0] * there_BP, sums_BP2[..., 1] * there_BP


def is_pair(batch: Batch) -> Tensor:
    """Which pairs there are: fp64 [B, P], 1 where both answers have an end."""
    return (by_document(batch.columns["ends"], batch) > 0).unflatten(1, (-1, 2)).all(-1).double()


class BradleyTerry:
    """Reward model: -log sigmoid(chosen - rejected - margin), each score read at the answer's last token.

    `center` weighs (chosen + rejected)^2, which keeps scores near zero (Eisenstein et al. 2023, arXiv:2312.09244). The
    optional column `margins` holds a pair's margin at the last token of its chosen answer (Touvron et al. 2023, Llama
    2). Source: Ouyang et al. 2022 (InstructGPT).
    """

    reads: Reads = "values"
    metrics: tuple[str, ...] = ("accuracy", "margin")

    def __init__(self, center: float = 0.0) -> None:
        self.center = center

    @classmethod
    def from_config(cls, config: Config) -> BradleyTerry:
        return cls(config.objective.center)

    def units(self, batch: Batch) -> Tensor:
        return is_pair(batch).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.values_BS is not None
        chosen_BP, rejected_BP = pairs(outputs.values_BS * batch.columns["ends"], batch)
        there_BP, gap_BP = is_pair(batch), chosen_BP - rejected_BP
        wanted_BP = pairs(batch.columns["margins"], batch)[0] if "margins" in batch.columns else 0.0
        loss_BP = -functional.logsigmoid(gap_BP - wanted_BP)
        if self.center:
            loss_BP = loss_BP + self.center * (chosen_BP + rejected_BP) ** 2
        metrics = {"accuracy": (gap_BP > 0).double().sum() * scale, "margin": gap_BP.detach().sum() * scale}
        return (loss_BP * there_BP).sum() * scale, metrics


class DPO:
    """Direct preference optimisation: -log sigmoid(beta h), where h is by how much more the policy prefers the chosen
    answer than the reference does, in nats (Rafailov et al. 2023, arXiv:2305.18290).

    `label_smoothing` e: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (cDPO, Mitchell 2023). `loss` "ipo":
    (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036). Log-probabilities are summed over an answer, not
    averaged. The loss is computed as its excess over that of a policy equal to the reference.
    """

    reads: Reads = "logprobs"
    metrics: tuple[str, ...] = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def __init__(self, beta: float = 0.1, loss: str = "sigmoid", label_smoothing: float = 0.0) -> None:
        self.beta, self.kind, self.label_smoothing = beta, loss, label_smoothing
        self.offset = math.log(2) if loss == "sigmoid" else (0.5 / beta) ** 2

    @classmethod
    def from_config(cls, config: Config) -> DPO:
        objective = config.objective
        return cls(objective.beta, objective.loss, objective.label_smoothing)

    def units(self, batch: Batch) -> Tensor:
        return is_pair(batch).sum()

    def loss(self, outputs: Outputs, batch: Batch, scale: Tensor | float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert outputs.logprobs_BS is not None
        ratio_BS = outputs.logprobs_BS.double() - batch.columns[REFERENCE].double()
        chosen_BP, rejected_BP = pairs(ratio_BS, batch)
        h_BP = chosen_BP - rejected_BP
        if self.kind == "ipo":
            excess_BP = (h_BP - 0.5 / self.beta) ** 2 - self.offset
        else:
            right_BP, wrong_BP = functional.logsigmoid(self.beta * h_BP), functional.logsigmoid(-self.beta * h_BP)
            excess_BP = -(1 - self.label_smoothing) * right_BP - self.label_smoothing * wrong_BP - self.offset
        sums = {
            "accuracy": (h_BP > 0).double(),
            "margin": self.beta * h_BP,
            "chosen_reward": self.beta * chosen_BP,
            "rejected_reward": self.beta * rejected_BP,
        }
        loss = (excess_BP * is_pair(batch)).sum() * scale
        return loss, {name: value.detach().sum() * scale for name, value in sums.items()}
