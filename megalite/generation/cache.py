"""Keys and values of the tokens so far, so that a new token costs one row instead of the whole sequence.

T positions so far, S new positions, B batch, k key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class DecoderCache:
    """One buffer of `capacity` positions for each tensor of a layer, allocated at its first write; see `KeyValueCache`.

    Memory in elements, for keys and values: 2 * layers of this rank * capacity * B * k * D. In memory a row's positions
    are neighbours, [B, k, capacity, D], since one query reads all of them. While `keeps` is False, new positions are
    left to another rank of the sequence, and only those so far are returned. `buffers` are those of an earlier cache,
    to be written anew.
    """

    def __init__(self, capacity: int, buffers: Mapping[int, tuple[Tensor, ...]] | None = None) -> None:
        self.capacity, self.keeps = capacity, True
        self._buffers: dict[int, tuple[Tensor, ...]] = dict(buffers or {})
        self._lengths: dict[int, int] = {}

    @property
    def buffers(self) -> Mapping[int, tuple[Tensor, ...]]:
        """By layer, [capacity, B, ...] each."""
        return self._buffers

    def written(self, length: int) -> None:
        """So many positions of the buffers have been written by now, the latest of them not through this cache."""
        self._lengths = dict.fromkeys(self._buffers, length)

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append a layer's new tensors [S, B, ...]; all of them so far, [T, B, ...], as views of the buffers."""
        if layer not in self._buffers:
            self._buffers[layer] = tuple(self._allocate(tensor) for tensor in new)
        start = self._lengths.get(layer, 0)
        if not self.keeps:
            return tuple(buffer[:start] for buffer in self._buffers[layer])
        stop = self._lengths[layer] = start + new[0].shape[0]
        if stop > self.capacity:
            raise IndexError(f"layer {layer}: {stop} positions in a cache of {self.capacity}")
        for buffer, tensor in zip(self._buffers[layer], new):
            buffer[start:stop] = tensor
        return tuple(buffer[:stop] for buffer in self._buffers[layer])

    def _allocate(self, new: Tensor) -> Tensor:
        """A buffer [capacity, B, ...], whose positions are the last dimension but one in memory."""
        before = new.dim() - 2 if new.dim() > 2 else new.dim() - 1
        shape = (*new.shape[1 : 1 + before], self.capacity, *new.shape[1 + before :])
        return new.new_empty(shape).movedim(before, 0)

    def keep(self, rows: int, moves: Mapping[int, int]) -> None:
        """Keep only the first `rows` rows, after each row `moves[to]`, one of the others, has been copied to row `to`.

        No memory is freed or allocated, but for the copies.
        """
        if moves and self._buffers:
            device = next(iter(self._buffers.values()))[0].device
            targets, sources = torch.tensor([list(moves), list(moves.values())], device=device)
            for layer, buffers in self._buffers.items():
                for buffer in buffers:
                    written = buffer[: self._lengths[layer]]
                    written.index_copy_(1, targets, written.index_select(1, sources))
        for layer, buffers in self._buffers.items():
            self._buffers[layer] = tuple(buffer[:, :rows] for buffer in buffers)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self._lengths = {layer: min(length, known) for layer, known in self._lengths.items()}

    def reserve(self, capacity: int) -> None:
        """Make room for at least so many positions; the memory at least doubles where it must grow."""
        if capacity <= self.capacity:
            return
        self.capacity = max(capacity, 2 * self.capacity)
        for layer, buffers in self._buffers.items():
            length, self._buffers[layer] = self._lengths[layer], tuple(map(self._allocate, buffers))
            for old, new in zip(buffers, self._buffers[layer]):
                new[:length] = old[:length]


class Memory:
    """What is cached of a conversation between one run and the next, on this rank."""

    def __init__(self) -> None:
        self.cache = DecoderCache(0)
        self.ids: list[int] = []
        """The tokens whose keys and values the cache holds."""

    def recall(self, prompt: Sequence[int], capacity: int) -> int:
        """How many of the prompt's tokens need not be computed again; the cache holds these and no others, with room
        for `capacity`. The last one must: its output is asked for."""
        same = 0
        for ours, theirs in zip(self.ids, prompt[:-1]):
            if ours != theirs:
                break
            same += 1
        self.cache.truncate(same)
        self.cache.reserve(capacity)
        self.ids = []  # until a run has ended well
        return same
