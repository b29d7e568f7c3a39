"""Answers of the policy to a step's prompts, and how they are dealt out as micro-batches.

Answer r of a step belongs to prompt r // answers. Every rank knows the tokens of all answers; the ranks of the last
stage know the numbers at their tokens. Which answers stand in which micro-batch follows from the seed and the step
alone: mini-batches are parts of a permutation of all answers, dealt to the ranks as `data.batches` deals samples.

R answers of the step, S tokens of the longest prompt with its answer, B answers of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config
from megalite.data.batch import Batch
from megalite.generation.generator import Completion
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.mesh import Group, Mesh

LENGTH_MULTIPLE = 32
"""Rows of answers are padded to a multiple of this, so that few different shapes occur."""


@dataclass(frozen=True)
class Answer:
    """One answer: the ids of its prompt, its own (with the token that ended it), the sampler's log-probabilities, and
    the text without the ending token. `finished`: it ended by itself, not by its greatest length."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool


def answer_of(completion: Completion, text: str) -> Answer:
    return Answer(
        completion.prompt_ids, completion.new_ids, completion.logprobs, text, finished=completion.reason != "length"
    )


@dataclass(frozen=True)
class Rollouts:
    """All answers of a step, as rows padded on the right; the same on every rank, on the host.

    `labels_RS` hold the next token where it belongs to the answer, else IGNORE_INDEX; `sampled_RS` the sampler's
    log-probabilities there; `ends_R` the place of each row's last token.
    """

    tokens_RS: Tensor
    labels_RS: Tensor
    sampled_RS: Tensor
    ends_R: Tensor
    finished_R: Tensor

    @property
    def mask_RS(self) -> Tensor:
        """float64, 1 at the actions: places whose label counts."""
        return (self.labels_RS != IGNORE_INDEX).double()

    @property
    def lengths_R(self) -> Tensor:
        """Tokens of each answer."""
        return (self.labels_RS != IGNORE_INDEX).sum(1)


def row_length(longest: int, config: Config) -> int:
    """The row length for answers of up to `longest` tokens with their prompts."""
    multiple = int(np.lcm(LENGTH_MULTIPLE, config.parallel.tensor * config.parallel.context * 2))
    return -(-longest // multiple) * multiple


def share_answers(answers: Sequence[Answer], group: Group, config: Config, device: torch.device) -> Rollouts:
    """Put together the answers of all data-parallel ranks, each of which gives as many, in rank order."""
    longest = max(len(answer.prompt_ids) + len(answer.ids) for answer in answers)
    longest = _largest(longest, group, device)
    length = row_length(longest, config)
    own = _rows(answers, length)
    gathered = []
    for part in own:
        whole = torch.empty(group.size * part.shape[0], *part.shape[1:], dtype=part.dtype, device=device)
        group.all_gather(whole, part.to(device)).wait()
        gathered.append(whole.cpu())
    return Rollouts(*gathered)


def _largest(number: int, group: Group, device: torch.device) -> int:
    value = torch.tensor([number], dtype=torch.int64, device=device)
    group.all_reduce(value, "max").wait()
    return int(value)


def _rows(answers: Sequence[Answer], length: int) -> tuple[Tensor, ...]:
    """The fields of `Rollouts` for these answers."""
    tokens = torch.zeros(len(answers), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    sampled = torch.zeros(len(answers), length, dtype=torch.float64)
    ends = torch.zeros(len(answers), dtype=torch.int64)
    for row, answer in enumerate(answers):
        start, stop = len(answer.prompt_ids), len(answer.prompt_ids) + len(answer.ids)
        tokens[row, :stop] = torch.tensor(answer.prompt_ids + answer.ids)
        labels[row, start - 1 : stop - 1] = tokens[row, start:stop]
        sampled[row, start - 1 : stop - 1] = torch.tensor(answer.logprobs, dtype=torch.float64)
        ends[row] = stop - 1
    return tokens, labels, sampled, ends, torch.tensor([answer.finished for answer in answers], dtype=torch.int64)


def epoch_order(answers: int, seed: int, first: int, epoch: int) -> np.ndarray:
    """The order in which one pass takes the answers of the step that begins at prompt `first`, int64 [R]."""
    return np.random.Generator(np.random.Philox(key=[seed, first], counter=[0, 0, 0, epoch])).permutation(answers)


@dataclass(frozen=True)
class Dealer:
    """Which answers are whose: micro-batch m of a list of answers is `micro_batch_size * samples_size` of them, of
    which rank r of those that share out samples takes the r-th part."""

    micro_batch_size: int
    index: int
    size: int
    device: torch.device

    @staticmethod
    def of(config: Config, mesh: Mesh) -> Dealer:
        return Dealer(config.train.micro_batch_size, mesh.samples_index, mesh.samples_size, mesh.device)

    def numbers(self, order: np.ndarray) -> np.ndarray:
        """The answers of this rank's micro-batches, int64 [micro-batches, B]."""
        return order.reshape(-1, self.size, self.micro_batch_size)[:, self.index]

    def batches(self, rollouts: Rollouts, order: np.ndarray, columns: Mapping[str, Tensor]) -> list[Batch]:
        """This rank's micro-batches; `columns` are [R, S] on the host, and become fp32."""
        return [
            Batch(
                rollouts.tokens_RS[rows].to(self.device),
                rollouts.labels_RS[rows].to(self.device),
                columns={name: column_RS[rows].float().to(self.device) for name, column_RS in columns.items()},
            )
            for rows in map(torch.from_numpy, self.numbers(order))
        ]

    def collect(self, parts: Sequence[Tensor], order: np.ndarray, group: Group) -> Tensor:
        """[R, S] float64 on the host, row by answer, from what each rank computed for its micro-batches ([B, S] each)
        of answers dealt in `order`."""
        own = torch.stack([part.double() for part in parts])
        everything = torch.empty(group.size * own.shape[0], *own.shape[1:], dtype=own.dtype, device=own.device)
        group.all_gather(everything, own).wait()
        # [rank, micro-batch, B, S] -> the order in which they were dealt
        dealt = everything.view(group.size, *own.shape).transpose(0, 1).flatten(0, 2).cpu()
        by_answer = torch.empty_like(dealt)
        by_answer[torch.from_numpy(order)] = dealt
        return by_answer


def columns_of(prompts: Sequence[Any], answers: int) -> dict[str, list[Any]]:
    """The further columns of the prompts' records, one entry an answer; None where a record lacks the column."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return {name: [prompt.columns.get(name) for prompt in prompts for _ in range(answers)] for name in names}
