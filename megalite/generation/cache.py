"""Keys and values of the tokens so far, so that a new token costs one row instead of the whole sequence.

T positions so far, S new positions, B batch, k key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from torch import Tensor


class DecoderCache:
    """One buffer of `capacity` positions for each tensor of a layer, allocated at its first write; see `KeyValueCache`.

    Memory in elements, for keys and values: 2 * layers of this rank * capacity * B * k * D.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffers: dict[int, tuple[Tensor, ...]] = {}
        self._lengths: dict[int, int] = {}

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append a layer's new tensors [S, B, ...]; all of them so far, [T, B, ...], as views of the buffers."""
        if layer not in self._buffers:
            self._buffers[layer] = tuple(tensor.new_empty((self.capacity, *tensor.shape[1:])) for tensor in new)
        start = self._lengths.get(layer, 0)
        stop = self._lengths[layer] = start + new[0].shape[0]
        if stop > self.capacity:
            raise IndexError(f"layer {layer}: {stop} positions in a cache of {self.capacity}")
        for buffer, tensor in zip(self._buffers[layer], new):
            buffer[start:stop] = tensor
        return tuple(buffer[:stop] for buffer in self._buffers[layer])
