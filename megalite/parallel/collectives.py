"""The collectives at the two boundaries of a tensor-parallel region.

A tensor-parallel block begins where its input is made full on every rank and ends where the ranks' partial outputs are
summed. In backward the two swap roles, and the layers (`megalite.parallel.linear`) call the other one:

    sequence parallel     begin: all-gather along the sequence       end: reduce-scatter along the sequence
    not sequence parallel begin: nothing, gradient all-reduced       end: all-reduce, gradient passed on

Tensors are sequence first (S, ...), so both run on contiguous memory without a copy. Every function returns a new
tensor and leaves its argument unchanged, except that `sum_start` consumes its input.
Sources: Shoeybi et al. 2019 (Megatron-LM, section 3), Korthikanti et al. 2022 (sequence parallelism, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalite.mesh import DONE, Group, Work


@dataclass(frozen=True)
class TensorRegion:
    """The tensor-parallel group, and whether activations outside the region are split along the sequence."""

    group: Group
    sequence: bool
    size: int = field(init=False)
    """Ranks of the group."""
    split: int = field(init=False)
    """Into how many parts the sequence dimension is cut outside the tensor-parallel blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.group.size)
        object.__setattr__(self, "split", self.group.size if self.sequence else 1)

    def gather_start(self, tensor: Tensor) -> tuple[Tensor, Work]:
        """Start to all-gather `tensor` along the sequence; the result is valid after the wait."""
        if self.split == 1:
            return tensor, DONE
        tensor = tensor.contiguous()
        whole = tensor.new_empty((tensor.shape[0] * self.split, *tensor.shape[1:]))
        return whole, self.group.all_gather(whole, tensor)

    def sum_start(self, partial: Tensor) -> tuple[Tensor, Work]:
        """Start to sum `partial` (consumed) over the group; under sequence parallelism each rank gets its part."""
        if self.size == 1:
            return partial, DONE
        partial = partial.contiguous()
        if not self.sequence:
            return partial, self.group.all_reduce(partial)
        part = partial.new_empty((partial.shape[0] // self.split, *partial.shape[1:]))
        return part, self.group.reduce_scatter(part, partial)

    def gather(self, tensor: Tensor) -> Tensor:
        if self.split == 1:
            return tensor
        whole, work = self.gather_start(tensor)
        work.wait()
        return whole

    def sum(self, partial: Tensor) -> Tensor:
        if self.size == 1:
            return partial
        total, work = self.sum_start(partial)
        work.wait()
        return total


@torch.no_grad()
def all_gather_stacked(tensor: Tensor, group: Group) -> Tensor:
    """Every rank's `tensor`, stacked along a new first dimension: [size, *tensor.shape]."""
    stacked = tensor.new_empty((group.size, *tensor.shape))
    group.all_gather(stacked.view(-1), tensor.contiguous().view(-1)).wait()
    return stacked
