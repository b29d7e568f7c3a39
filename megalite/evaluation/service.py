"""A model that answers: rank 0 asks, all ranks compute, at any tensor x pipeline x data layout.

    with serving(model, tokenizer) as service:
        if service is not None:  # rank 0; the others serve inside `serving` until rank 0 leaves the block
            service.loglikelihoods([(context, continuation), ...])

A request is a message that every rank acts on together, so whatever asks (a benchmark's code, a library, data on one
machine's disk) is needed on rank 0 alone. Data-parallel ranks share the work.

B rows of a micro-batch (1 here), S positions of a row, P prompt, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.errors import UNUSABLE, UserError
from megalite.evaluation.channel import Channel
from megalite.evaluation.request_packing import Block, Ids, Request, blocks, collect, pack
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels.cross_entropy import IGNORE_INDEX
from megalite.model.decoder import Stage
from megalite.model.sharded import MicroBatches, ShardedModel
from megalite.text.tokenizers import Tokenizer

ROW_POSITIONS = {"cpu": 4096, "cuda": 16384}
"""Positions of a packed row: enough that little stays free behind documents of a thousand tokens."""

_ROWS_TOGETHER = 8
"""Rows of one data-parallel rank that go through the pipeline together."""

Advance = Callable[[int], object]
"""Called with the number of requests that are answered since the last call."""


def unheard(count: int) -> None:
    """Progress that nobody follows."""


@contextmanager
def serving(model: ShardedModel, tokenizer: Tokenizer | None, *, batch_size: int = 32) -> Iterator[Service | None]:
    """Rank 0 gets the service; every other rank gets None, after it has served all that rank 0 asked for.

    `batch_size` prompts are generated together on each data-parallel rank. Where rank 0 fails, the others leave with
    exit code 2 without a word: rank 0 says why.
    """
    service = Service(model, tokenizer, batch_size)
    with service.session() as asks:
        yield service if asks else None


class Service:
    """Answers requests in sessions; see `serving`, which makes one for one session.

    Every rank makes it and enters its sessions alike; within them, the methods that answer are rank 0's.
    """

    def __init__(self, model: ShardedModel, tokenizer: Tokenizer | None, batch_size: int) -> None:
        self.model, self.mesh, self.tokenizer, self.batch_size = model, model.mesh, tokenizer, batch_size
        self.longest = model.config.model.max_positions
        self.cut = 0
        """Contexts that were cut because the model does not read as much."""
        self._channel = Channel(model.mesh)
        self._commands: Mapping[str, Callable[[Mapping[str, Any], np.ndarray], Any]] = {
            "score": self._score,
            "generate": self._generate,
        }

    @contextmanager
    def session(self) -> Iterator[bool]:
        """A context that yields True on rank 0; the other ranks serve it first, and then get False."""
        if self.mesh.rank > 0:
            self._serve()
            yield False
            return
        try:
            yield True
        except BaseException:
            self._stop(failed=True)
            raise
        self._stop(failed=False)

    def _serve(self) -> None:
        """Do what rank 0 asks for until it stops."""
        while True:
            message, ids = self._channel.receive()
            if message["do"] == "stop":
                if message["failed"]:
                    raise SystemExit(UNUSABLE)
                return
            self._commands[message["do"]](message, ids)

    def _stop(self, *, failed: bool) -> None:
        self._channel.send({"do": "stop", "failed": failed}, np.empty(0, np.int32))

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank; outside of sessions."""
        if self.mesh.rank == 0:
            self._channel.send({"value": value}, np.empty(0, np.int32))
            return value
        return self._channel.receive()[0]["value"]

    def _ask(self, message: Mapping[str, Any], ids: np.ndarray) -> Any:
        self._channel.send(message, ids)
        return self._commands[message["do"]](message, ids)

    # Log-likelihoods

    def loglikelihoods(self, requests: Sequence[Request], advance: Advance = unheard) -> list[tuple[float, bool]]:
        """For each (context, continuation): the sum of the continuation's log-probabilities (natural), and whether each
        of its tokens is the model's likeliest.

        A context that is too long loses its beginning (counted in `cut`). Raises UserError for a continuation that is
        longer than the model's positions, and for tokens that the model does not know.
        """
        if not requests:
            return []
        work = collect(requests, self.longest)
        self.check(document.input for document in work.documents)
        self.check([label for _, label, _ in document.labels] for document in work.documents)
        self.cut += work.cut
        lengths = [len(document.input) for document in work.documents]
        ranks = self.mesh.samples_size
        length, rows = pack(lengths, ranks, ROW_POSITIONS[self.mesh.device.type])
        sums, greedy = np.zeros(work.answers), np.ones(work.answers, bool)
        told = 0
        for block in blocks(work.documents, rows, length, ranks * _ROWS_TOGETHER):
            logprobs, likeliest = self._ask(*_message_of(block)).reshape(2, -1)
            np.add.at(sums, block.answer, logprobs)
            np.logical_and.at(greedy, block.answer, likeliest > 0)
            told += len(block.tokens)
            share = len(requests) * told // len(rows)
            advance(share - len(requests) * (told - len(block.tokens)) // len(rows))
        return [(float(sums[answer]), bool(greedy[answer])) for answer in work.answer_of]

    def rolling(self, texts: Sequence[Ids], prefix: int, advance: Advance = unheard) -> list[float]:
        """The log-likelihood of each text after the token `prefix`, every token once.

        A text longer than the model's positions is read in windows, each with as much context as fits.
        """
        windows = [list(windows_of(text, prefix, self.longest)) for text in texts]
        found = iter(self.loglikelihoods([window for each in windows for window in each], advance))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def check(self, inputs: Iterable[Ids]) -> None:
        """Raise UserError for token ids that the model does not know."""
        vocabulary = self.model.config.model.vocab_size
        for ids in inputs:
            if (found := np.asarray(ids)).size and not 0 <= found.min() <= found.max() < vocabulary:
                bad = int(found[(found < 0) | (found >= vocabulary)][0])
                raise UserError(
                    f"token id {bad} is not among the model's model.vocab_size = {vocabulary}; "
                    "use the model's own tokenizer"
                )

    def _score(self, message: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
        """Every rank: [2 * labels] float64 of a block's labels, the sum of what the last stages found."""
        rows, length = message["rows"], message["length"]
        tokens, positions, documents, labels = np.split(ids, np.cumsum([rows * length] * 3))
        parts = [part.reshape(rows, length) for part in (tokens, positions, documents)]
        row, place, label = labels.reshape(3, -1)
        dp, me = self.mesh.samples_size, self.mesh.samples_index
        count = -(-rows // dp)
        # Under context parallelism each rank has some places of every row, and answers for these.
        own = self.model.context.rows(length).cpu().numpy()
        at = np.full(self.model.context.padded(length), -1)
        at[own] = np.arange(len(own))
        mine = [np.flatnonzero((row == micro * dp + me) & (at[place] >= 0)) for micro in range(count)]
        batches: MicroBatches = [
            self._batch(parts, micro * dp + me, message["packed"]) if self.model.needs_batches else None
            for micro in range(count)
        ]

        def finish(stage: Stage, hidden: Tensor, batch: Batch, micro: int) -> Tensor:
            chosen = mine[micro]
            return stage.label_stats_at(hidden, self._indices(at[place[chosen]]), self._indices(label[chosen]))

        found = self.model.run(batches, finish, shape=(1, length))
        stats = np.zeros((2, len(row)))
        if self.mesh.index("tp") == 0:  # tensor ranks hold the same
            for micro, stats_2N in found.items():
                stats[:, mine[micro]] = stats_2N.double().cpu().numpy()
        return self._channel.sum(stats).reshape(-1)

    def _indices(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.mesh.device)

    def _batch(self, parts: Sequence[np.ndarray], row: int, packed: bool) -> Batch:
        """One row as a micro-batch; an empty one behind the last."""
        length = parts[0].shape[1]
        rows = [part[row : row + 1] if row < len(part) else np.zeros((1, length)) for part in parts]
        tokens_BS, positions_BS, documents_BS = map(self._indices, rows)
        labels_BS = torch.full_like(tokens_BS, IGNORE_INDEX)
        if not packed and length <= self.longest:
            return Batch(tokens_BS, labels_BS)
        return Batch(tokens_BS, labels_BS, positions_BS, documents_BS)

    # Generation

    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        max_new_tokens: int,
        stop_strings: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        advance: Advance = unheard,
    ) -> list[str]:
        """The text that follows each prompt, cut before the first stop string.

        A prompt that leaves no room for `max_new_tokens` loses its beginning (counted in `cut`).
        """
        assert self.tokenizer is not None
        room = self.longest - max_new_tokens
        if room < 1:
            raise UserError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's "
                f"model.max_positions = {self.longest}; ask for fewer"
            )
        self.cut += sum(len(prompt) > room for prompt in prompts)
        cut = [np.asarray(prompt, np.int32)[-room:] for prompt in prompts]
        self.check(cut)
        order = sorted(range(len(cut)), key=lambda number: -len(cut[number]))
        texts = [""] * len(cut)
        together = self.batch_size * self.mesh.dp
        limits = Limits(max_new_tokens, frozenset(stop_ids), tuple(stop_strings))
        for start in range(0, len(order), together):
            part = order[start : start + together]
            message = {
                "do": "generate",
                "numbers": part,
                "lengths": [len(cut[number]) for number in part],
                "sampling": asdict(sampling),
                "limits": [max_new_tokens, sorted(limits.stop_ids), list(limits.stop_strings)],
            }
            found = self._ask(message, np.concatenate([cut[number] for number in part]))
            for number, ids in zip(part, found):
                texts[number] = self._text(ids, limits)
            advance(len(part))
        return texts

    def _text(self, ids: list[int], limits: Limits) -> str:
        """As lm-evaluation-harness makes it: the new tokens decoded by themselves, cut before each stop string."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(ids[:-1] if ids and ids[-1] in limits.stop_ids else ids)
        for stop in limits.stop_strings:
            text = text.split(stop)[0] if stop else text
        return text

    def _generate(self, message: Mapping[str, Any], ids: np.ndarray) -> list[list[int]]:
        """Every rank: the new tokens of every prompt, in the order of the prompts."""
        prompts = np.split(ids, np.cumsum(message["lengths"])[:-1])
        new, stop_ids, stop_strings = message["limits"]
        dp, me = self.mesh.dp, self.mesh.index("dp")  # ranks that share the experts generate the same
        mine = prompts[me::dp]
        completions: list[list[int]] = []
        if mine:
            with self.model.generating() as stages:
                generator = Generator(stages, self.model.owners, self.mesh, self.model.config.model)
                found = generator.run(
                    [prompt.tolist() for prompt in mine],
                    Sampling(**message["sampling"]),
                    Limits(new, frozenset(stop_ids), tuple(stop_strings)),
                    self.tokenizer if stop_strings else None,
                    rows=message["numbers"][me::dp],
                )
                completions = [one.new_ids for one in found]
        speaks = all(self.mesh.index(axis) == 0 for axis in ("tp", "pp", "cp", "ep"))
        by_rank = [part for part in self._channel.exchange(completions if speaks else []) if part]
        return [by_rank[number % dp][number // dp] for number in range(len(prompts))]


def windows_of(text: Ids, prefix: int, longest: int) -> Iterator[Request]:
    """The (context, continuation) windows that predict every token of a text once, with the most context."""
    ids = np.concatenate(([prefix], np.asarray(text, np.int64)))
    total = len(ids) - 1
    stop = min(longest, total)
    if total:
        yield ids[:1], ids[1 : stop + 1]
    while stop < total:
        first, stop = stop, min(stop + longest, total)
        yield ids[stop - longest : first + 1], ids[first + 1 : stop + 1]


def _message_of(block: Block) -> tuple[dict[str, Any], np.ndarray]:
    rows, length = block.tokens.shape
    message = {"do": "score", "rows": rows, "length": length, "packed": block.packed}
    arrays = (block.tokens, block.positions, block.documents, block.row, block.place, block.label)
    return message, np.concatenate([array.reshape(-1) for array in arrays])
