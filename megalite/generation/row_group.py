"""Rows that are generated together: their next tokens, their places and what is cached of them.

Prompts of different lengths are padded on the left, so that all rows grow at the same place. Padding is a document of
its own, which no token of the prompt sees, and positions count from a row's first true token: a row's logits are those
it would have alone.

Under context parallelism prompts are padded further, to what the ranks can share, and a rank has its part of each. A
new token is computed on all ranks, each of which attends to its own part of the cache; the ranks take turns in caching
new ones.

P longest prompt with its padding, S positions of one forward pass, C positions at most, B rows that have not finished,
U numbers drawn at once; t positions that this rank has.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megalite.generation.cache import DecoderCache, Memory
from megalite.generation.sampling import uniforms
from megalite.model.attention import Positions
from megalite.model.decoder import Stage
from megalite.parallel.context import ContextRegion
from megalite.parallel.context_attention import CachedRows

_NUMBERS_AT_ONCE = 64


class RowGroup:
    """Rows in the batch of one forward pass. `members` holds the caller's name of each, in the order of the batch.

    A row that has finished is dropped: the last rows of the batch take the places of those that were before them, so
    that only their part of the cache is copied.
    """

    def __init__(
        self,
        prompts: Mapping[int, Sequence[int]],
        numbers: Sequence[int],
        most_new: int,
        context: ContextRegion,
        memory: Memory | None = None,
        cache: DecoderCache | None = None,
    ) -> None:
        """`prompts` by the caller's name; `numbers[name]` is the row's global number, which its draws depend on; no row
        gets more than `most_new` tokens. With `memory`, for a single prompt, only the part of it that is not there is
        computed; a split prompt is computed whole. `cache` is an empty one with room for all, to be used."""
        device = context.device
        self.members = list(prompts)
        self.start = self.drawn = 0
        self._numbers, self._context = numbers, context
        longest = context.padded(max(map(len, prompts.values())))
        capacity = longest + most_new
        self._padding = [longest - len(prompt) for prompt in prompts.values()]
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(self._padding, prompts.values())]
        if cache is not None:
            self.cache = cache
        elif memory is None or context.size > 1:
            self.cache = DecoderCache(longest // context.size + -(-most_new // context.size))
        else:
            self.start, self.cache = memory.recall(padded[0], capacity), memory.cache
        self.tokens_BS = torch.tensor(padded, device=device)[:, self.start :]
        self._length = longest - self.start  # of the sequences in the next forward pass
        self._rows_t = context.rows(longest) if context.size > 1 else None
        if self._rows_t is not None:
            self.tokens_BS = self.tokens_BS[:, self._rows_t]
        # A row's place in its own text, and 1 where there is one.
        padding_B1 = torch.tensor(self._padding, device=device).unsqueeze(1)
        self._places_BC = torch.arange(capacity, device=device) - padding_B1
        self._documents_BC = (self._places_BC >= 0).to(torch.int32)
        self._uniforms_BU, self._uniforms_from = torch.empty(0), -_NUMBERS_AT_ONCE

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def first_B(self) -> Tensor:
        """The position of every row's first token, behind its padding."""
        return -self._places_BC[:, 0]

    def positions(self, stage: Stage) -> Positions:
        """Of the tokens in `tokens_BS`."""
        length, rows_t, stop = self._length, self._rows_t, self.start + self._length
        documents_BT = self._documents_BC[:, :stop]
        if rows_t is not None and self.start > 0:
            positions = stage.positions(1, self.start, self._places_BC[:, self.start : stop])
            return replace(positions, documents_SB=CachedRows(documents_BT.t(), rows_t))
        if not any(self._padding):
            return stage.positions(length, self.start, rows_s=rows_t)
        places_BS = self._places_BC[:, self.start : stop] if rows_t is None else self._places_BC[:, rows_t]
        return stage.positions(length, self.start, places_BS.clamp(min=0), documents_BT)

    def uniforms(self, seed: int) -> Tensor:
        """The rows' numbers for the token that is due, float64 [B]."""
        numbers_BU, first = self.table(seed)
        return numbers_BU[:, self.drawn - first]

    def table(self, seed: int) -> tuple[Tensor, int]:
        """(the rows' numbers for the token that is due, some before and some after it, float64 [B, U]; whose the first
        is)."""
        if not 0 <= self.drawn - self._uniforms_from < _NUMBERS_AT_ONCE:
            rows = [self._numbers[member] for member in self.members]
            table = uniforms(seed, rows, self.drawn, _NUMBERS_AT_ONCE)
            self._uniforms_BU, self._uniforms_from = torch.from_numpy(table).to(self.tokens_BS.device), self.drawn
        return self._uniforms_BU, self._uniforms_from

    def append(self, tokens_B: Tensor) -> None:
        """The tokens that have been drawn are those of the next forward pass."""
        self.start, self._length = self.start + self._length, 1
        if self._rows_t is not None:
            self.cache.keeps = self.drawn % self._context.size == self._context.group.index
            if self.cache.keeps:
                new_1 = torch.arange(self.start, self.start + 1, device=self._rows_t.device)
                self._rows_t = torch.cat((self._rows_t, new_1))
        self.drawn += 1
        self.tokens_BS = tokens_B.unsqueeze(1)

    def drop(self, finished: Container[int]) -> None:
        """Leave the rows of these names out from the next forward pass on."""
        left = [slot for slot, member in enumerate(self.members) if member not in finished]
        if len(left) == self.size:
            return
        if not left:  # what is cached stays
            self.members = []
            return
        holes = [slot for slot in range(len(left)) if self.members[slot] in finished]
        moves = dict(zip(holes, [slot for slot in left if slot >= len(left)]))
        order = [moves.get(slot, slot) for slot in range(len(left))]
        self.members = [self.members[slot] for slot in order]
        self._padding = [self._padding[slot] for slot in order]
        self.cache.keep(len(order), moves)
        index = torch.tensor(order, dtype=torch.int64, device=self.tokens_BS.device)
        self.tokens_BS = self.tokens_BS[index]
        self._places_BC, self._documents_BC = self._places_BC[index], self._documents_BC[index]
        if len(self._uniforms_BU):
            self._uniforms_BU = self._uniforms_BU[index]
