"""Keys and values of the tokens so far, so that a new token costs one row instead of the whole sequence.

T positions so far, C capacity, S new positions, B batch, k key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from torch import Tensor


class DecoderCache:
    """One buffer of `capacity` positions per layer, allocated when the layer first writes; see `KeyValueCache`.

    Memory in elements: 2 * layers of this stage * capacity * B * k * D.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}

    def extend(self, layer: int, k_SBkD: Tensor, v_SBkD: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; all of them so far, [T, B, k, D], as views of the buffers."""
        if layer not in self._buffers:
            shape = (self.capacity, *k_SBkD.shape[1:])
            self._buffers[layer] = (k_SBkD.new_empty(shape), v_SBkD.new_empty(shape))
        start = self._lengths.get(layer, 0)
        stop = self._lengths[layer] = start + k_SBkD.shape[0]
        if stop > self.capacity:
            raise IndexError(f"layer {layer}: {stop} positions in a cache of {self.capacity}")
        keys_CBkD, values_CBkD = self._buffers[layer]
        keys_CBkD[start:stop] = k_SBkD
        values_CBkD[start:stop] = v_SBkD
        return keys_CBkD[:stop], values_CBkD[:stop]
