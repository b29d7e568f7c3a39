"""Evaluations during training: how well the live model predicts the right answers, in bits per byte of their text.

Accuracies of small or young models are those of guessing, while these numbers fall smoothly from the first steps on (as
OLMo's in-loop evaluations). No example precedes a question, and for MMLU the answer's text is predicted, not a letter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from megalite.config import Config
from megalite.errors import UserError
from megalite.evaluation.data import Row, load
from megalite.evaluation.request_packing import Request
from megalite.evaluation.service import Service
from megalite.evaluation.text_model import Pair, TextModel
from megalite.model.sharded import ShardedModel
from megalite.text.leading import leading_ids
from megalite.text.tokenizers import load_tokenizer


def gold(task: str, row: Row) -> Pair:
    """A question and its right answer, which begins with the white space between the two."""
    if task == "humaneval":
        prompt = row["prompt"].rstrip()
        return prompt, row["prompt"][len(prompt) :] + row["canonical_solution"]
    answer = row["choices"][row["answer"]] if task == "mmlu" else row["answer"]
    return f"Question: {row['question'].strip()}\nAnswer:", f" {answer}"


class Answers:
    """The questions of `eval.tasks`, tokenized once on rank 0. Every rank makes the same calls.

    Raises UserError, on all ranks: data that cannot be read, a tokenizer that does not fit the model.
    """

    def __init__(self, config: Config, model: ShardedModel) -> None:
        self.config, self._rank = config, model.mesh.rank
        self._service = Service(model, None, 1)
        self._requests: list[Request] = []
        self._parts: list[tuple[str, int, int]] = []
        """(task, requests, bytes of their answers), in the order of the requests."""
        problem = ""
        if self._rank == 0:
            try:
                self._read()
            except UserError as error:
                problem = str(error)
        if problem := self._service.from_rank_0(problem):
            raise UserError(problem)

    def due(self, step: int, last: bool) -> bool:
        return step % self.config.eval.interval == 0 or last

    def measure(self) -> dict[str, float]:
        """`TASK_bits_per_byte` for each task, equal on all ranks; collective."""
        bits: list[float] = []
        with self._service.session() as asks:
            if asks:
                found = iter(self._service.loglikelihoods(self._requests))
                for _, count, size in self._parts:
                    nats = -sum(next(found)[0] for _ in range(count))
                    bits.append(nats / math.log(2) / size)
        told = self._service.from_rank_0(bits)
        return {f"{task}_bits_per_byte": value for task, value in zip(self.config.eval.tasks, told)}

    def _read(self) -> None:
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        eos = () if tokenizer.eod is None else (tokenizer.eod,)
        text = TextModel(self._service, tokenizer, leading_ids(tokenizer), eos)
        for task in self.config.eval.tasks:
            rows = load(task, self.config.eval.data, "eval.data =")["test"]
            pairs = [gold(task, row) for row in spread(rows, self.config.eval.samples)]
            kept = [
                (request, len(answer.encode()))
                for request, (_, answer) in zip(text.requests(pairs), pairs)
                if 0 < len(request[1]) <= self._service.longest
            ]
            if not kept:
                raise UserError(f"eval.tasks: no answer of {task} fits model.max_positions = {self._service.longest}")
            self._service.check(np.concatenate(request) for request, _ in kept)
            self._requests += [request for request, _ in kept]
            self._parts.append((task, len(kept), sum(size for _, size in kept)))


def spread(rows: list[Row], most: int) -> Iterator[Row]:
    """At most so many of the rows, evenly spread, the same every time."""
    count = min(most, len(rows))
    return (rows[number * len(rows) // count] for number in range(count))
