"""Flat storage for parameters and their gradients, replicated over the data-parallel ranks or sharded (ZeRO).

A bucket lays parameters out one after the other in a flat buffer [length], padded so that it divides into equal shards
over the data-parallel ranks. This rank's optimizer updates the elements `updated`; `owned` are their values and
`updated_gradients` their reduced fp32 gradients. The kinds differ in what else is kept, and for how long:

    Bucket, zero = 0      all parameters and gradients, all-reduced once a step; every rank updates everything
    Bucket, zero = 1      the same, reduce-scattered; each rank updates its shard, then parameters are all-gathered
    ShardedBucket, 2      gradients: only the shard persists; the full buffer lives from backward to its reduction
    ShardedBucket, 3      parameters too: unsharded for use, released soon after

Frozen parameters have buckets of their own, without gradients. Source: Rajbhandari et al. 2020 (ZeRO), stages 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.mesh import Group, Work
from megalite.placement import PlacedParameter

_ALIGNMENT = 64
"""Elements. Every shard starts on a cache line, so that vectorised updates round alike however the bucket is sharded;
the remainder that they would process differently is padding."""


@dataclass(frozen=True)
class Slot:
    """A parameter's place in its bucket: elements [start, start + numel), row-major."""

    parameter: PlacedParameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's view of a flat buffer."""
        return flat[self.start : self.stop].view(self.parameter.shape)


class Bucket:
    """Parameters of one kind (of one role, all with weight decay or all without, all trained or all frozen) with full
    fp32 gradients, reduced once a step.

    With `deferred`, gradients of replicas within the model must be summed first (see `StageBuckets`). `on_complete` is
    called when every parameter has added its gradient of every micro-batch. A weight that is used twice adds a gradient
    twice, so the first step counts how often each parameter reports per micro-batch, and is reduced at its end.
    """

    def __init__(self, parameters: list[PlacedParameter], group: Group, zero: int, *, deferred: bool) -> None:
        self.group, self.deferred = group, deferred
        self.trained = parameters[0].requires_grad
        self.sharded = zero > 0 and self.trained
        self.decays, self.role = parameters[0].decays, parameters[0].placement.role
        self.slots: list[Slot] = []
        for parameter in parameters:
            self.slots.append(Slot(parameter, self.slots[-1].stop if self.slots else 0))
        unit = _ALIGNMENT * group.size
        self.length = -(-self.slots[-1].stop // unit) * unit
        self.shard = slice(group.index * self.length // group.size, (group.index + 1) * self.length // group.size)
        self.updated = self.shard if self.sharded else slice(0, self.length)
        self.device, self.dtype = parameters[0].device, parameters[0].dtype
        self.parameters = torch.zeros(self.length, dtype=self.dtype, device=self.device)
        self.derived: dict[int, Any] = {}
        self.on_complete: Callable[[], None] | None = None
        self.gradients: Tensor | None = None
        self._place = {id(slot.parameter): index for index, slot in enumerate(self.slots)}
        self._work: Work | None = None
        self._gathering: Work | None = None
        self.ready = True
        self._reports = [0] * len(self.slots)
        self._per_micro_batch: list[int] | None = None
        self._micro_batches, self._missing, self._launched = 0, 0, False
        self._adopt_parameters()
        if self.trained:
            self._hold_gradients()

    @torch.no_grad()
    def _adopt_parameters(self) -> None:
        """Move the parameters' storage into the bucket."""
        for slot in self.slots:
            slot.of(self.parameters).copy_(slot.parameter)
            slot.parameter.data = slot.of(self.parameters)
            slot.parameter.store = self

    def _hold_gradients(self) -> None:
        """Allocate the full gradients and the output of the reduction, this rank's shard."""
        self.gradients = torch.zeros(self.length, dtype=torch.float32, device=self.device)
        separate = self.sharded and self.group.size > 1
        self.shard_gradients = torch.zeros_like(self.gradients[self.shard]) if separate else self.gradients[self.shard]
        for slot in self.slots:
            slot.parameter.main_grad = slot.of(self.gradients)

    @property
    def owned(self) -> Tensor:
        """The parameters that this rank's optimizer updates: elements `updated`."""
        return self.parameters[self.updated]

    @property
    def updated_gradients(self) -> Tensor:
        """Their reduced gradients, after `wait`."""
        if self.sharded:
            return self.shard_gradients
        assert self.gradients is not None
        return self.gradients

    def begin(self, micro_batches: int) -> None:
        """Forget the gradients before a step of `micro_batches` micro-batches."""
        assert self.gradients is not None
        self._forget(self.gradients)
        if self._micro_batches:
            counts = [divmod(reports, self._micro_batches) for reports in self._reports]
            even = all(rest == 0 and count > 0 for count, rest in counts)
            self._per_micro_batch = [count for count, _ in counts] if even else None
        self._reports = [0] * len(self.slots)
        self._micro_batches, self._missing, self._launched = micro_batches, len(self.slots), False

    def _forget(self, gradients: Tensor) -> None:
        """Whoever adds a matrix's gradient first overwrites the last one; the rest is cleared here, in one go."""
        if not self.decays:
            gradients.zero_()
            return
        if self.slots[-1].stop < self.length:
            gradients[self.slots[-1].stop :].zero_()
        for slot in self.slots:
            slot.parameter.stale = True

    def complete_gradients(self) -> None:
        """Clear what nothing was added to in this step."""
        for slot in self.slots:
            slot.parameter.grad_buffer()

    # What layers call

    def gather(self, parameter: PlacedParameter) -> None:
        self.wait_for_all_gather()

    def allocate_gradients(self) -> None:
        return None

    def gradient_added(self, parameter: PlacedParameter) -> None:
        if self._launched and not self.deferred:
            raise RuntimeError(
                f"the gradient of {parameter.name} was added to after its reduction had begun: the weight was used "
                "more often in this step than in the one before"
            )
        index = self._place[id(parameter)]
        self._reports[index] += 1
        if self._per_micro_batch is None:
            return
        self._missing -= self._reports[index] == self._per_micro_batch[index] * self._micro_batches
        if self._missing == 0 and self.on_complete is not None:
            self._missing = -1
            self.on_complete()

    # Communication

    def launch(self) -> None:
        """Start the reduction over the data-parallel ranks."""
        if self.gradients is None:
            return
        self._launched = True
        self.complete_gradients()
        if not self.sharded:
            self._work = self.group.all_reduce(self.gradients)
        elif self.group.size > 1:
            self._work = self.group.reduce_scatter(self.shard_gradients, self.gradients)

    def wait(self) -> None:
        """Wait for a launched reduction."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def gather_parameters(self) -> None:
        """Start to all-gather the updated shards; `wait_for_all_gather` completes it."""
        self.derived.clear()
        if self.sharded and self.group.size > 1:
            self._gathering = self.group.all_gather(self.parameters, self.parameters[self.shard].clone())
            self.ready = False

    def wait_for_all_gather(self) -> None:
        """Return once the parameters can be read."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None
            self.ready = True

    # For parameters that are resharded (ZeRO-3); no-ops otherwise

    def open(self) -> None:
        """Allocate all parameters, for the caller to write; `close` then shards them."""

    def close(self) -> None:
        """Keep the shard of the parameters just written, and release the rest."""


class ShardedBucket(Bucket):
    """ZeRO-2: full gradients live only between a backward pass and its reduction. ZeRO-3: so do full parameters.

    The gradients of a micro-batch are reduced as soon as every parameter has added its own, and accumulated in the
    shard; a parameter that adds to them again later is reduced again. Under ZeRO-3 the buffer `parameters`, of which
    the parameters are views, stays the same tensor: `release` frees its storage and `unshard` fills it again. That is
    safe because autograd never saves these parameters (they are used only in our own Functions, which read them again
    in backward). `on_use` is called when a parameter is read, and decides which buckets are unsharded.
    """

    def __init__(self, parameters: list[PlacedParameter], group: Group, zero: int, *, deferred: bool) -> None:
        self.reshards = zero == 3
        self.on_use: Callable[[], None] | None = None
        super().__init__(parameters, group, zero, deferred=deferred)
        self._flying: tuple[Tensor, Tensor] | None = None
        self._arrived: set[int] = set()
        if self.reshards:
            self.updated = self.shard
            self._owned = self.parameters[self.shard].clone()
            self.release()

    def _hold_gradients(self) -> None:
        self.shard_gradients = torch.zeros(self.length // self.group.size, dtype=torch.float32, device=self.device)

    def allocate_gradients(self) -> None:
        self.gradients = torch.empty(self.length, dtype=torch.float32, device=self.device)
        for slot in self.slots:
            slot.parameter.main_grad = slot.of(self.gradients)
        self._forget(self.gradients)

    @property
    def owned(self) -> Tensor:
        return self._owned if self.reshards else super().owned

    def begin(self, micro_batches: int) -> None:
        self.shard_gradients.zero_()
        self._arrived.clear()

    def gather(self, parameter: PlacedParameter) -> None:
        if self.on_use is not None:
            self.on_use()
        self.wait_for_all_gather()

    def gradient_added(self, parameter: PlacedParameter) -> None:
        self._arrived.add(id(parameter))
        if len(self._arrived) == len(self.slots) and self.on_complete is not None:
            self.on_complete()

    def launch(self) -> None:
        """Start to reduce what has been accumulated so far, if anything, into the shard."""
        if self.gradients is None:
            return
        self.wait()
        self.complete_gradients()
        part = torch.empty_like(self.shard_gradients)
        self._flying = (part, self.gradients)
        self._work = self.group.reduce_scatter(part, self.gradients)
        self.gradients = None
        self._arrived.clear()
        for slot in self.slots:
            slot.parameter.main_grad = None

    def wait(self) -> None:
        super().wait()
        if self._flying is not None:
            self.shard_gradients.add_(self._flying[0])
            self._flying = None

    # ZeRO-3

    @property
    def released(self) -> bool:
        return self.parameters.untyped_storage().size() == 0

    def _allocate_parameters(self) -> None:
        self.parameters.untyped_storage().resize_(self.length * self.parameters.element_size())

    def unshard(self) -> None:
        """Start to all-gather the full parameters; `wait_for_all_gather` completes it."""
        if self.released:
            self._allocate_parameters()
            self._gathering = self.group.all_gather(self.parameters, self._owned)

    def wait_for_all_gather(self) -> None:
        super().wait_for_all_gather()
        self.ready = not self.reshards

    def release(self) -> None:
        """Free the memory of the full parameters."""
        self.derived.clear()
        self.wait_for_all_gather()
        self.parameters.untyped_storage().resize_(0)

    def gather_parameters(self) -> None:
        if not self.reshards:
            super().gather_parameters()

    def open(self) -> None:
        if self.reshards and self.released:
            self._allocate_parameters()
            self.parameters.zero_()

    def close(self) -> None:
        if self.reshards:
            self._owned.copy_(self.parameters[self.shard])
            self.release()
