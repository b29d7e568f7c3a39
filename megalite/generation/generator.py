"""Generation by the trainer's own stages: prompts in, tokens out, over tensor and pipeline ranks.

The rows go through the pipeline in as many groups as it has ranks: while one rank computes a group's next layers, the
others are busy with other groups. When a group has passed the last stage, tensor rank 0 there draws its tokens and
sends them to all ranks of the copy of the model, in one broadcast; every rank finds by itself which rows have ended.

S positions of one forward pass, B rows of a group, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import RunFailed, UserError
from megalite.generation.rows import RowGroup
from megalite.generation.sampling import Sampling, sample
from megalite.generation.stopping import TextStream
from megalite.mesh import DONE, Mesh, Work
from megalite.model.decoder import Stage
from megalite.schedule.lowering import lower
from megalite.schedule.ops import Op
from megalite.schedule.schedules import forward_only
from megalite.text.tokenizers import Tokenizer

Listener = Callable[[int, str], None]
"""(row, piece of text), called as soon as the piece is certain."""

_LOOK_EVERY = 8
"""On a GPU, tokens after which the host looks whether a row has ended. Each look waits for the device, and a row that
has ended is computed in vain until then; its results are the same."""

_PENDING_SENDS = 2
"""How many tensors may be on their way to the next stage before the oldest is waited for."""


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
    sampler's, as `Generator.run` was told. `reason` is `length`, `token` (a stop token) or `string` (a stop string).
    Without a tokenizer `text` stays empty.
    """

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: str = ""


class Generator:
    """Generates with this rank's stages; all ranks of one copy of the model (tensor x pipeline) call `run` alike.

    `stages` are those of `ShardedModel.generating()`, by number, and `owners` says for each stage of the model which
    pipeline rank holds it. Copies along the data axes need not generate the same rows, or at the same time.
    """

    def __init__(self, stages: Mapping[int, Stage], owners: Sequence[int], mesh: Mesh, model: ModelConfig) -> None:
        if any(stage.region.sequence for stage in stages.values()):
            raise ValueError("generation needs whole sequences: use the stages of ShardedModel.generating()")
        self.stages, self.owners, self.mesh, self.model = stages, tuple(owners), mesh, model
        self.look_every = _LOOK_EVERY if mesh.device.type == "cuda" else 1
        self._dtype = next(next(iter(stages.values())).parameters()).dtype
        self._pp, self._everyone = mesh.group("pp"), mesh.group("pp", "tp")
        self._drawer = self._everyone.ranks.index(mesh.rank_at(pp=self.owners[-1], tp=0))

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
    ) -> list[Completion]:
        """A completion for each prompt (at least one token each), all of them in memory at once.

        `limits` are one for all or one for each. `rows` are the prompts' global numbers, 0 … without them: what is
        drawn for a row depends on seed, number and position alone. With `sampler_logprobs` the log-probabilities are
        those of the distribution drawn from (its temperature, top-k and top-p), otherwise those of the model.
        Raises UserError for a prompt that does not fit, RunFailed if the model's outputs are not finite.
        """
        own = _each(limits, prompts)
        self.check(prompts, own, tokenizer)
        results = _Results(prompts, own, tokenizer, listener)
        numbers = range(len(prompts)) if rows is None else rows
        groups = []
        for part in self._parts(prompts, [row for row in range(len(prompts)) if own[row].max_new_tokens > 0]):
            capacity = max(len(prompts[row]) for row in part) + max(own[row].max_new_tokens for row in part)
            groups.append(RowGroup({row: prompts[row] for row in part}, numbers, capacity, self.mesh.device))
        if groups:
            _Flow(self, groups, sampling, results, sampler_logprobs).run()
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


def _each(limits: Limits | Sequence[Limits], prompts: Sequence[Sequence[int]]) -> list[Limits]:
    return [limits] * len(prompts) if isinstance(limits, Limits) else list(limits)


class _Flow:
    """One run on one rank: the operations of a forward-only schedule, token after token without a barrier between."""

    def __init__(
        self,
        generator: Generator,
        groups: Sequence[RowGroup],
        sampling: Sampling,
        results: _Results,
        sampler_logprobs: bool,
    ) -> None:
        self._generator, self._groups, self._sampling, self._results = generator, groups, sampling, results
        self._sampler_logprobs = sampler_logprobs
        pp, self._last = generator.mesh.index("pp"), len(generator.owners) - 1
        self._draws = pp == generator.owners[-1] and generator.mesh.index("tp") == 0
        self._ops = lower(forward_only(generator.owners, len(groups)))[pp]
        self._final = {op.micro: index for index, op in enumerate(self._ops)}
        self._hidden: dict[tuple[int, int], tuple[Tensor, Work]] = {}
        self._sending: deque[tuple[Tensor, Work]] = deque()
        self._drawn: dict[int, tuple[Tensor, Work]] = {}
        self._unread: dict[int, list[Tensor]] = {number: [] for number in range(len(groups))}

    def run(self) -> None:
        while any(group.size for group in self._groups):
            for index, op in enumerate(self._ops):
                if not self._ready(op.micro):
                    continue
                self._perform(op)
                if index == self._final[op.micro] and not self._draws:
                    self._announce(op.micro, torch.empty(0))
        self._finish_sends(0)

    def _ready(self, number: int) -> bool:
        """Whether the group has rows left, now that its last tokens, if they were on their way, are known."""
        group = self._groups[number]
        if number in self._drawn:
            both_2B, work = self._drawn.pop(number)
            work.wait()
            self._unread[number].append(both_2B)
            group.append(both_2B[0].long())
            if self._results.due(group, self._generator.look_every):
                self._read(number)
        return group.size > 0

    def _read(self, number: int) -> None:
        """Give the rows the tokens that the host has not yet seen, and drop those that have ended."""
        group = self._groups[number]
        table = torch.stack(self._unread[number]).tolist()
        self._unread[number].clear()
        for tokens, logprobs in table:
            self._results.add(group.members, tokens, logprobs)
        group.drop({member for member in group.members if self._results.completions[member].reason})

    def _perform(self, op: Op) -> None:
        generator, group, key = self._generator, self._groups[op.micro], (op.stage, op.micro)
        if op.kind == "RF":
            shape = (group.tokens_BS.shape[1], group.size, generator.model.hidden_size)
            hidden_SBH = torch.empty(shape, dtype=generator._dtype, device=generator.mesh.device)
            self._hidden[key] = hidden_SBH, generator._pp.receive(hidden_SBH, generator.owners[op.stage - 1])
        elif op.kind == "SF":
            hidden_SBH, _ = self._hidden.pop(key)
            self._sending.append((hidden_SBH, generator._pp.send(hidden_SBH, generator.owners[op.stage + 1])))
            self._finish_sends(_PENDING_SENDS)
        else:
            self._forward(op, group)

    def _forward(self, op: Op, group: RowGroup) -> None:
        generator, stage = self._generator, self._generator.stages[op.stage]
        x, arrived = self._hidden.pop((op.stage, op.micro)) if op.stage > 0 else (group.tokens_BS, DONE)
        arrived.wait()
        hidden_SBH = stage(x, group.positions(stage), group.cache)
        if op.stage == self._last:
            logits_BV = stage.logits(hidden_SBH[-1:]).squeeze(0)
            if self._draws:
                self._announce(op.micro, logits_BV)
        elif generator.owners[op.stage + 1] == generator.mesh.index("pp"):
            self._hidden[op.stage + 1, op.micro] = hidden_SBH, DONE
        else:
            self._hidden[op.stage, op.micro] = hidden_SBH.contiguous(), DONE

    def _announce(self, number: int, logits_BV: Tensor) -> None:
        """Draw the group's tokens, on the one rank that does, and start to tell all ranks: ids and log-probabilities.

        As float64, which holds every id, so that one message is enough.
        """
        generator, group = self._generator, self._groups[number]
        both_2B = torch.zeros(2, group.size, dtype=torch.float64, device=generator.mesh.device)
        if self._draws:
            numbers_B = group.uniforms(self._sampling.seed)
            both_2B[0], both_2B[1] = sample(
                logits_BV, self._sampling, numbers_B, sampler_logprobs=self._sampler_logprobs
            )
        self._drawn[number] = both_2B, generator._everyone.broadcast(both_2B, generator._drawer)

    def _finish_sends(self, most: int) -> None:
        while len(self._sending) > most:
            self._sending.popleft()[1].wait()


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
        if completion.reason and text is not None:
            self._tell(row, text.finish())
            completion.text = text.text

    def _tell(self, row: int, piece: str) -> None:
        if piece and self._listener is not None:
            self._listener(row, piece)
