"""The loop of tokens as a CUDA graph: layers, output layer, drawing and counting of one token, recorded and replayed.

Whatever differs from token to token lies in tensors with room for all of it: the place that the token takes in the
cache, its number in the answer, the random numbers of all answers, the tokens drawn. A step reads the counters and adds
one, so that the host only says "again", and looks at the tokens as seldom as without a graph. Prompts are computed as
usual, into the same buffers. A step keeps to the rules of `megalite.cuda_graph`.

A graph is of one number of rows. Rows that have ended leave the batch as usual, but the graph that runs is that of the
next power of two: places beyond the rows left are computed in vain. All graphs share the buffers, and so do later runs
that fit into them. Kept are thus the memory of one cache, and that of a step for all rows, for half of them, a quarter,
and so on.

R rows and C positions of the buffers, G rows of a graph, B rows that have not finished, S positions of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megalite.cuda_graph import GraphRecorder
from megalite.generation.cache import DecoderCache
from megalite.generation.row_group import RowGroup
from megalite.kernels.attention.decode import Filled
from megalite.kernels.layout import next_power_of_two
from megalite.mesh import Mesh
from megalite.model.decoder import Stage

Draw = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, V], a number for each row, float64 [B]) -> ids and log-probabilities, float64 [2, B]. Equal ones draw
alike."""

CAPACITY_STEP = 256
"""Positions of the buffers come in multiples of this, so that runs of about one length share them."""


@dataclass(frozen=True)
class _Buffers:
    """What recorded steps read and write besides the weights. Which rows these are, and what comes after, is the
    host's to write before a replay; the tensors stay."""

    rows: int
    capacity: int
    tokens_R: Tensor
    first_R: Tensor
    """The position of every row's first token, behind its padding."""
    numbers_RC: Tensor
    """What tokens are drawn by, float64."""
    drawn_C2R: Tensor
    """Ids and log-probabilities of every row's tokens, float64."""
    length_1: Tensor
    """Positions in the cache; the token that is computed next takes the next one."""
    count_1: Tensor
    """Tokens that have been drawn."""

    @staticmethod
    def of(rows: int, capacity: int, device: torch.device) -> _Buffers:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        numbers, drawn = (zeros(*shape, dtype=torch.float64) for shape in ((rows, capacity), (capacity, 2, rows)))
        return _Buffers(rows, capacity, zeros(rows), zeros(rows), numbers, drawn, zeros(1), zeros(1))


class _Slot:
    """A `megalite.model.attention.KeyValueCache` that writes the first `rows` rows of buffers at a place that lies in
    memory, and gives all of them, [C, G, ...]."""

    def __init__(self, layers: DecoderCache, rows: int, place_1: Tensor) -> None:
        self._layers, self._rows, self._place_1 = layers, rows, place_1

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        buffers = tuple(buffer[:, : self._rows] for buffer in self._layers.buffers[layer])
        for buffer, tensor in zip(buffers, new, strict=True):
            buffer.index_copy_(0, self._place_1, tensor)
        return buffers


class TokenGraph:
    """The loop of a model of one stage, for a `Generator`; every tensor rank has one and calls it alike."""

    def __init__(self, stage: Stage, mesh: Mesh, recorder: GraphRecorder) -> None:
        self._stage, self._mesh, self._recorder = stage, mesh, recorder
        self._everyone, self._draws = mesh.group("pp", "cp", "tp"), mesh.index("tp") == 0
        self._buffers = _Buffers.of(0, 0, mesh.device)
        self._layers = DecoderCache(0)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._kind: object = None

    def cache(self, rows: int, positions: int) -> DecoderCache:
        """An empty cache in the buffers for so many rows; others are made where these have no room for it."""
        fits = rows <= self._buffers.rows and positions <= self._buffers.capacity
        if not fits or not self._layers.buffers:
            self._graphs.clear()  # before more is allocated
            self._buffers, self._layers = _Buffers.of(0, 0, self._mesh.device), DecoderCache(0)
            capacity = -(-positions // CAPACITY_STEP) * CAPACITY_STEP
            self._buffers, self._layers = _Buffers.of(rows, capacity, self._mesh.device), DecoderCache(capacity)
        whole = self._layers.buffers
        parts = {layer: tuple(buffer[:, :rows] for buffer in buffers) for layer, buffers in whole.items()}
        return DecoderCache(self._buffers.capacity, parts)

    def run(self, group: RowGroup, seed: int, draw: Draw, told: Callable[[Tensor], None]) -> None:
        """The tokens of a group, whose cache is of `cache`, until it has no rows left; `told`, as in `Flow`, drops
        those that have ended."""
        self._forget_others(draw)
        self._begin(group, seed, draw, told)
        while group.size:
            size, last = group.size, self._place(group, seed)
            replay = self._graph(min(next_power_of_two(size), self._buffers.rows), draw)
            while group.size == size and group.drawn < last:
                replay()
                drawn_2B = self._buffers.drawn_C2R[group.drawn, :, :size]
                group.append(self._buffers.tokens_R[:size])
                group.cache.written(group.start)
                told(drawn_2B)

    def _forget_others(self, draw: Draw) -> None:
        """Drop graphs that draw in another way, or read weights from where they are no more."""
        kind = draw, *(parameter.data_ptr() for parameter in self._stage.parameters())
        if kind != self._kind:
            self._kind = kind
            self._graphs.clear()

    def _begin(self, group: RowGroup, seed: int, draw: Draw, told: Callable[[Tensor], None]) -> None:
        """The prompts and the first token of each, not recorded."""
        hidden_SBH = self._stage(group.tokens_BS, group.positions(self._stage), group.cache)
        if not self._layers.buffers:  # made by this first pass, with all of the rows
            self._layers = DecoderCache(self._buffers.capacity, group.cache.buffers)
        drawn_2B = self._draw(hidden_SBH[-1:], draw, group.uniforms(seed))
        group.append(drawn_2B[0].long())
        told(drawn_2B)

    def _draw(self, hidden_1BH: Tensor, draw: Draw, numbers_B: Tensor) -> Tensor:
        """What every tensor rank is told of the next tokens by the first."""
        logits_BV = self._stage.logits(hidden_1BH).squeeze(0)
        drawn_2B = draw(logits_BV, numbers_B) if self._draws else torch.zeros_like(numbers_B).repeat(2, 1)
        self._everyone.broadcast(drawn_2B, 0).wait()
        return drawn_2B

    def _place(self, group: RowGroup, seed: int) -> int:
        """Write where the rows are into the buffers; up to which token of the answers there are random numbers now."""
        buffers, (numbers_BU, first) = self._buffers, group.table(seed)
        last = min(first + numbers_BU.shape[1], buffers.capacity)
        buffers.numbers_RC[: group.size, first:last] = numbers_BU[:, : last - first]
        buffers.tokens_R[: group.size] = group.tokens_BS.squeeze(1)
        buffers.first_R.zero_()
        buffers.first_R[: group.size] = group.first_B
        buffers.length_1.fill_(group.start)
        buffers.count_1.fill_(group.drawn)
        return last

    def _graph(self, rows: int, draw: Draw) -> Callable[[], None]:
        if rows not in self._graphs:
            buffers, step = self._buffers, partial(self._step, rows, draw)
            advanced = buffers.tokens_R, buffers.length_1, buffers.count_1
            kept = [tensor.clone() for tensor in advanced]
            with self._mesh.waits_unobserved():
                self._recorder.warm_up(step)
                _, self._graphs[rows] = self._recorder.record(step)
            for tensor, value in zip(advanced, kept):  # the tokens computed meanwhile will be computed again
                tensor.copy_(value)
        return self._graphs[rows]

    def _step(self, rows: int, draw: Draw) -> None:
        """One token of the first `rows` rows."""
        buffers, stage = self._buffers, self._stage
        first_G, length_1 = buffers.first_R[:rows], buffers.length_1
        # What is computed in vain may be longer than any text.
        places_G1 = (length_1 - first_G).clamp(0, stage.build.model.max_positions - 1).unsqueeze(1)
        positions = replace(stage.positions(1, positions_BS=places_G1), filled=Filled(first_G, length_1 + 1))
        slot = _Slot(self._layers, rows, length_1)
        hidden_1GH = stage(buffers.tokens_R[:rows].unsqueeze(1), positions, slot)
        numbers_G = buffers.numbers_RC[:rows].index_select(1, buffers.count_1).squeeze(1)
        drawn_2G = self._draw(hidden_1GH, draw, numbers_G)
        buffers.drawn_C2R[..., :rows].index_copy_(0, buffers.count_1, drawn_2G.unsqueeze(0))
        buffers.tokens_R[:rows].copy_(drawn_2G[0])
        length_1.add_(1)
        buffers.count_1.add_(1)
