"""Generation by the trainer's own stages: prompts in, tokens out, over tensor and pipeline ranks.

The rows go through the pipeline in as many groups as it has ranks: while one rank computes a group's next layers, the
others are busy with other groups. When a group has passed the last stage, tensor rank 0 there draws its tokens and
sends them to all ranks of the copy of the model, in one broadcast; every rank finds by itself which rows have ended.

S positions of one forward pass, B rows of a group, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.config.check_graph import TOKENS
from megalite.cuda_graph import GraphRecorder
from megalite.errors import RunFailed, UserError
from megalite.generation.cache import Memory
from megalite.generation.flow import Flow
from megalite.generation.row_group import RowGroup
from megalite.generation.sampling import Sampling, sample
from megalite.generation.stopping import TextStream
from megalite.generation.token_graph import TokenGraph
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.model.head import VocabParallelHead
from megalite.text.tokenizers import Tokenizer

Listener = Callable[[int, str], None]
"""(row, piece of text), called as soon as the piece is certain."""

_LOOK_EVERY = 8
"""On a GPU, tokens after which the host looks whether a row has ended. Each look waits for the device, and a row that
has ended is computed in vain until then; its results are the same."""


@dataclass(frozen=True)
class Limits:
    """When a row ends: after so many new tokens, after any of these tokens, before any of these strings."""

    max_new_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass
class Completion:
    """One row's result. `new_ids` holds the stop token, if one ended it; `text` is without it and without stop strings.

    `logprobs` are natural logarithms of the new tokens' probabilities: the model's (at temperature 1), or the
    sampler's, as `Generator.run` was told. `reason` is `length`, `token` (a stop token), `string` (a stop string) or
    `interrupted`. Without a tokenizer `text` stays empty.
    """

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: str = ""


class Generator:
    """Generates with this rank's stages; all ranks of one copy of the model (tensor x pipeline x context) call `run`
    alike.

    `stages` are those of `ShardedModel.generating()`, by number, and `owners` says for each stage of the model which
    pipeline rank holds it. Copies along the data axes need not generate the same rows, or at the same time. With
    `trainer_logprobs`, the log-probabilities of completions are computed as in training, at temperature 1. With a
    `graph`, the loop of tokens is recorded by it and replayed (`TokenGraph`), where one pipeline and one context rank
    hold the whole model.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        owners: Sequence[int],
        mesh: Mesh,
        model: ModelConfig,
        *,
        trainer_logprobs: bool = False,
        graph: GraphRecorder | None = None,
    ) -> None:
        if any(stage.region.sequence for stage in stages.values()):
            raise ValueError("generation needs whole sequences: use the stages of ShardedModel.generating()")
        self.stages, self.owners, self.mesh, self.model = stages, tuple(owners), mesh, model
        last = stages.get(len(self.owners) - 1)
        self._trainer_head = last.head if trainer_logprobs and last is not None else None
        self.look_every = _LOOK_EVERY if mesh.device.type == "cuda" else 1
        self._context = next(iter(stages.values())).context
        mesh.group("pp", "cp", "tp")  # made now, on every rank
        if graph is not None and (wrong := _uncovered(model, mesh, len(self.owners) // mesh.pp)):
            raise ValueError(f"no graph of a token is made with {wrong}; see megalite.config.check_graph")
        self._tokens = None if graph is None else TokenGraph(stages[0], mesh, graph)

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits | Sequence[Limits],
        tokenizer: Tokenizer | None = None,
        listener: Listener | None = None,
        *,
        rows: Sequence[int] | None = None,
        sampler_logprobs: bool = False,
        memory: Memory | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """A completion for each prompt (at least one token each), all of them in memory at once.

        `limits` are one for all or one for each. `rows` are the prompts' global numbers, 0 … without them: what is
        drawn for a row depends on seed, number and position alone. With `sampler_logprobs` the log-probabilities are
        those of the distribution drawn from (its temperature, top-k and top-p), otherwise those of the model.
        `memory`, for one prompt at a time, keeps what is cached for the next run. `interrupt` is asked after every
        token, on every rank; where it says yes, on all alike, all rows end, for the reason `interrupted`.
        Raises UserError for a prompt that does not fit, or a sampling that a graph cannot record; RunFailed if the
        model's outputs are not finite.
        """
        own = _each(limits, prompts)
        self.check(prompts, own, tokenizer)
        if memory is not None and len(prompts) != 1:
            raise ValueError(f"a memory is of one prompt, not of {len(prompts)}")
        if self._tokens is not None:
            sampling.check_fixed_shapes()
            if memory is not None:
                raise ValueError("a graph has a cache of its own, which no other run may keep")
        results = _Results(prompts, own, tokenizer, listener)
        numbers = range(len(prompts)) if rows is None else rows
        groups = []
        for part in self._parts(prompts, [row for row in range(len(prompts)) if own[row].max_new_tokens > 0]):
            most_new = max(own[row].max_new_tokens for row in part)
            texts, cache = {row: prompts[row] for row in part}, None
            if self._tokens is not None:
                cache = self._tokens.cache(len(texts), max(map(len, texts.values())) + most_new)
            groups.append(RowGroup(texts, numbers, most_new, self._context, memory, cache))
        unread: list[list[Tensor]] = [[] for _ in groups]

        draw, seed = Drawing(replace(sampling, seed=0), sampler_logprobs, self._trainer_head), sampling.seed

        def drawn(group: RowGroup, logits_BV: Tensor) -> Tensor:
            return draw(logits_BV, group.uniforms(seed))

        def told(number: int, drawn_2B: Tensor) -> None:
            group = groups[number]
            unread[number].append(drawn_2B)
            if interrupt is not None or results.due(group, self.look_every):
                for tokens, logprobs in torch.stack(unread[number]).tolist():
                    results.add(group.members, tokens, logprobs)
                unread[number].clear()
                if interrupt is not None and interrupt():
                    results.interrupt()
                group.drop({member for member in group.members if results.completions[member].reason})

        if self._tokens is not None:
            for number, group in enumerate(groups):
                self._tokens.run(group, seed, draw, partial(told, number))
        elif groups:
            Flow(self.stages, self.owners, self.mesh, groups, drawn, told).run()
            if memory is not None:
                (completion,) = results.completions
                memory.ids = (completion.prompt_ids + completion.new_ids)[:-1]
        return results.completions

    def run_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits | Sequence[Limits],
        tokenizer: Tokenizer | None = None,
        *,
        batch: int = 64,
        rows: Sequence[int] | None = None,
        sampler_logprobs: bool = False,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """`run` for any number of prompts, at most `batch` at a time, longest first; completions in the given order.

        Prompts of similar length share a batch. How they are divided changes no result. `progress` is told after every
        batch how many are done.
        """
        own = _each(limits, prompts)
        self.check(prompts, own, tokenizer)
        numbers = range(len(prompts)) if rows is None else rows
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        done: dict[int, Completion] = {}
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            completions = self.run(
                [prompts[row] for row in part],
                sampling,
                [own[row] for row in part],
                tokenizer,
                rows=[numbers[row] for row in part],
                sampler_logprobs=sampler_logprobs,
            )
            done.update(zip(part, completions))
            progress(len(done))
        return [done[row] for row in range(len(prompts))]

    def check(
        self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits], tokenizer: Tokenizer | None
    ) -> None:
        """Raise UserError for what `run` would refuse."""
        for row, (prompt, own) in enumerate(zip(prompts, _each(limits, prompts), strict=True)):
            if own.stop_strings and tokenizer is None:
                raise UserError("stop strings need a tokenizer, and this checkpoint carries none; give stop ids")
            if not prompt:
                raise UserError(f"prompt {row + 1} is empty; give at least one token to go on from")
            if len(prompt) + own.max_new_tokens > self.model.max_positions:
                raise UserError(
                    f"prompt {row + 1} has {len(prompt)} tokens; with max-new-tokens = {own.max_new_tokens} that is "
                    f"more than the model's model.max_positions = {self.model.max_positions}"
                )

    def _parts(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[int]]:
        """The rows of every group; of similar length where there are several, so that less is padded."""
        order = sorted(rows, key=lambda row: -len(prompts[row]))
        count = min(self.mesh.pp, len(rows))
        return [order[len(order) * part // count : len(order) * (part + 1) // count] for part in range(count)]


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn of their logits [B, V] and of a number for each row, whatever its seed: ids and
    log-probabilities, float64 [2, B]."""

    sampling: Sampling
    sampler_logprobs: bool
    trainer_head: VocabParallelHead | None

    def __call__(self, logits_BV: Tensor, numbers_B: Tensor) -> Tensor:
        tokens_B, logprobs_B = sample(logits_BV, self.sampling, numbers_B, sampler_logprobs=self.sampler_logprobs)
        if self.trainer_head is not None:
            logprobs_B = self.trainer_head.token_logprobs(logits_BV, tokens_B)
        return torch.stack((tokens_B.double(), logprobs_B.double()))  # float64 holds every id


def _uncovered(model: ModelConfig, mesh: Mesh, virtual_stages: int) -> str:
    """The first field, with its value, that a graph of a token does not cover; empty without one."""
    known = {"parallel.pipeline": mesh.pp, "parallel.virtual_stages": virtual_stages, "parallel.context": mesh.cp}
    known |= {f"model.{name}": getattr(model, name) for name in ("attention", "experts")}
    return next((f"{path} = {value}" for path, value in known.items() if value not in TOKENS[path]), "")


def _each(limits: Limits | Sequence[Limits], prompts: Sequence[Sequence[int]]) -> list[Limits]:
    return [limits] * len(prompts) if isinstance(limits, Limits) else list(limits)


class _Results:
    """The rows' completions while they grow."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[Limits],
        tokenizer: Tokenizer | None,
        listener: Listener | None,
    ) -> None:
        self._limits, self._listener = limits, listener
        self._lengths = {own.max_new_tokens for own in limits}
        self._stops = any(own.stop_ids or own.stop_strings for own in limits)
        self.completions = [
            Completion(list(prompt), reason="" if own.max_new_tokens > 0 else "length")
            for prompt, own in zip(prompts, limits)
        ]
        self._texts: list[TextStream | None] = [None] * len(prompts)
        if tokenizer is not None:
            for row, prompt in enumerate(prompts):
                stream = TextStream(tokenizer, limits[row].stop_strings)
                stream.prime(prompt)
                self._texts[row] = stream

    def due(self, group: RowGroup, every: int) -> bool:
        """Whether the host must look at the group's tokens now: somebody listens, or a row may have ended."""
        if self._listener is not None or group.drawn in self._lengths:
            return True
        return self._stops and group.drawn % every == 0

    def add(self, rows: Sequence[int], tokens: Sequence[float], logprobs: Sequence[float]) -> None:
        """Give each of these rows that has not ended its next token."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            completion = self.completions[row]
            if completion.reason:
                continue
            if not math.isfinite(logprob):
                raise RunFailed(
                    f"prompt {row + 1}, new token {len(completion.new_ids) + 1}: the model's outputs are not finite; "
                    "its weights hold NaN or are too large for the precision"
                )
            completion.new_ids.append(int(token))
            completion.logprobs.append(logprob)
            self._advance(row, completion, int(token))

    def _advance(self, row: int, completion: Completion, token: int) -> None:
        text = self._texts[row]
        if token in self._limits[row].stop_ids:
            completion.reason = "token"
        elif text is not None:
            self._tell(row, text.feed(token))
            completion.reason = "string" if text.stopped else ""
        if not completion.reason and len(completion.new_ids) == self._limits[row].max_new_tokens:
            completion.reason = "length"
        if completion.reason:
            self._finish(row, completion)

    def interrupt(self) -> None:
        """End all rows that have not ended."""
        for row, completion in enumerate(self.completions):
            if not completion.reason:
                completion.reason = "interrupted"
                self._finish(row, completion)

    def _finish(self, row: int, completion: Completion) -> None:
        text = self._texts[row]
        if text is not None:
            self._tell(row, text.finish())
            completion.text = text.text

    def _tell(self, row: int, piece: str) -> None:
        if piece and self._listener is not None:
            self._listener(row, piece)
