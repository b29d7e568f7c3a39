"""Generation by the trainer's own stages: prompts in, tokens out, over tensor and pipeline ranks.

Prompts of different lengths are padded on the left, so that all rows grow at the same place. Padding is a document of
its own, which no token of the prompt sees, and positions count from a row's first true token: a row's logits are those
it would have alone.

P longest prompt, S positions of one forward pass, T positions so far, B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.generation.cache import DecoderCache
from megalite.generation.sampling import RowStreams, Sampling, sample
from megalite.generation.stopping import TextStream
from megalite.mesh import Mesh
from megalite.model.attention import Positions
from megalite.model.decoder import Stage
from megalite.text.tokenizers import Tokenizer

Listener = Callable[[int, str], None]
"""(row, piece of text), called as soon as the piece is certain."""


@dataclass(frozen=True)
class Limits:
    """When a row ends: after so many new tokens, after any of these tokens, before any of these strings."""

    max_new_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


@dataclass
class Completion:
    """One row's result. `new_ids` holds the stop token, if one ended it; `text` is without it and without stop strings.

    `logprobs` are natural logarithms of the new tokens' probabilities at temperature 1. `reason` is `length`, `token`
    (a stop token) or `string` (a stop string). Without a tokenizer `text` stays empty.
    """

    prompt_ids: list[int]
    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    reason: str = ""


class Generator:
    """Generates with this rank's stages; every rank of the mesh calls `run` alike.

    `stages` are those of `ShardedModel.generating()`, by number, and `owners` says for each stage of the model which
    pipeline rank holds it.
    """

    def __init__(self, stages: Mapping[int, Stage], owners: Sequence[int], mesh: Mesh, model: ModelConfig) -> None:
        if any(stage.region.sequence for stage in stages.values()):
            raise ValueError("generation needs whole sequences: use the stages of ShardedModel.generating()")
        self.stages, self.owners, self.mesh, self.model = stages, tuple(owners), mesh, model
        self._any_stage = next(iter(stages.values()))
        self._dtype = next(self._any_stage.parameters()).dtype
        self._tp, self._pp = mesh.group("tp"), mesh.group("pp")

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits,
        tokenizer: Tokenizer | None = None,
        listener: Listener | None = None,
    ) -> list[Completion]:
        """A completion for each prompt (at least one token each). Raises UserError for a prompt that does not fit."""
        self.check(prompts, limits, tokenizer)
        batch = _Rows(prompts, limits, tokenizer, listener)
        tokens_BS, padding_B = _pad_left(prompts, self.mesh.device)
        capacity = tokens_BS.shape[1] + limits.max_new_tokens
        cache, streams, start = DecoderCache(capacity), RowStreams(sampling.seed, len(prompts)), 0
        for _ in range(limits.max_new_tokens):
            positions = self._positions(start, tokens_BS.shape[1], padding_B)
            logits_BV = self._forward(tokens_BS, positions, cache)
            chosen_B, logprobs_B = self._choose(logits_BV, sampling, streams, len(prompts))
            if batch.add(chosen_B.tolist(), logprobs_B.tolist()):
                break
            start += tokens_BS.shape[1]
            tokens_BS = chosen_B.unsqueeze(1)
        return batch.finish()

    def check(self, prompts: Sequence[Sequence[int]], limits: Limits, tokenizer: Tokenizer | None) -> None:
        """Raise UserError for what `run` would refuse."""
        if limits.stop_strings and tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this checkpoint carries none; give stop ids")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {row + 1} is empty; give at least one token to go on from")
            if len(prompt) + limits.max_new_tokens > self.model.max_positions:
                raise UserError(
                    f"prompt {row + 1} has {len(prompt)} tokens; with max-new-tokens = {limits.max_new_tokens} that is "
                    f"more than the model's model.max_positions = {self.model.max_positions}"
                )

    def _positions(self, start: int, length: int, padding_B: Tensor) -> Positions:
        """Rotations of positions start … start + length - 1, counted from each row's first true token."""
        if not bool(padding_B.any()):
            return self._any_stage.positions(length, start)
        steps_T = torch.arange(start + length, device=padding_B.device)
        places_BT = steps_T - padding_B.unsqueeze(1)
        seen_BT = (places_BT >= 0).to(torch.int32)
        return self._any_stage.positions(length, start, places_BT[:, start:].clamp(min=0), seen_BT)

    def _forward(self, tokens_BS: Tensor, positions: Positions, cache: DecoderCache) -> Tensor | None:
        """Logits [B, V] (fp32) after the last position, on the last stage; None on the others."""
        shape = (tokens_BS.shape[1], tokens_BS.shape[0], self.model.hidden_size)
        hidden_SBH = torch.empty(0)
        for number, owner in enumerate(self.owners):
            if owner != self._pp.index:
                continue
            x = hidden_SBH if number > 0 else tokens_BS
            if number > 0 and self.owners[number - 1] != owner:
                x = torch.empty(shape, dtype=self._dtype, device=self.mesh.device)
                self._pp.receive(x, self.owners[number - 1]).wait()
            hidden_SBH = self.stages[number](x, positions, cache)
            if number == len(self.owners) - 1:
                return self.stages[number].logits(hidden_SBH[-1:]).squeeze(0).float()
            if self.owners[number + 1] != owner:
                self._pp.send(hidden_SBH.contiguous(), self.owners[number + 1]).wait()
        return None

    def _choose(
        self, logits_BV: Tensor | None, sampling: Sampling, streams: RowStreams, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The next tokens (int64 [B]) and their log-probabilities ([B]), equal on every rank."""
        uniforms_B = streams.next()
        both_2B = torch.zeros(2, rows, dtype=torch.float64, device=self.mesh.device)
        if logits_BV is not None:
            chosen_B = sample(logits_BV, sampling, uniforms_B)
            both_2B[0] = chosen_B
            both_2B[1] = logits_BV.log_softmax(-1).gather(-1, chosen_B.unsqueeze(1)).squeeze(1)
            self._tp.broadcast(both_2B, 0).wait()
        self._pp.broadcast(both_2B, self.owners[-1]).wait()
        return both_2B[0].long(), both_2B[1]


class _Rows:
    """The rows' results while they grow."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Limits,
        tokenizer: Tokenizer | None,
        listener: Listener | None,
    ) -> None:
        self._limits, self._listener = limits, listener
        self._completions = [Completion(list(prompt)) for prompt in prompts]
        self._texts: list[TextStream | None] = [None] * len(prompts)
        if tokenizer is not None:
            for row, prompt in enumerate(prompts):
                stream = TextStream(tokenizer, limits.stop_strings)
                stream.prime(prompt)
                self._texts[row] = stream

    def add(self, tokens: list[int], logprobs: list[float]) -> bool:
        """Give each unfinished row its token; whether all rows are finished."""
        for row, completion in enumerate(self._completions):
            if completion.reason:
                continue
            completion.new_ids.append(tokens[row])
            completion.logprobs.append(logprobs[row])
            self._advance(row, completion, tokens[row])
        return all(completion.reason for completion in self._completions)

    def _advance(self, row: int, completion: Completion, token: int) -> None:
        text = self._texts[row]
        if token in self._limits.stop_ids:
            completion.reason = "token"
        elif text is not None:
            self._tell(row, text.feed(token))
            completion.reason = "string" if text.stopped else ""
        if not completion.reason and len(completion.new_ids) == self._limits.max_new_tokens:
            completion.reason = "length"
        if completion.reason and text is not None:
            self._tell(row, text.finish())
            completion.text = text.text

    def _tell(self, row: int, piece: str) -> None:
        if piece and self._listener is not None:
            self._listener(row, piece)

    def finish(self) -> list[Completion]:
        return self._completions


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, P], each row's end at the right edge, and the padding in front of each row [B]."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BP = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
    padding_B = torch.tensor([longest - len(prompt) for prompt in prompts])
    return tokens_BP.to(device), padding_B.to(device)
