"""Data parallelism: flat gradient buckets, reduced while backward still runs, and ZeRO-1 sharding of the optimizer.

The parameters of one pipeline stage lie one after the other in flat buckets, in about the order in which backward
finishes them. A bucket is three flat tensors of one layout: the parameters themselves (fp32 or bf16), their fp32
gradients, and this rank's shard of the reduced gradients. Each is padded so that the data-parallel ranks can cut it in
equal shards.

    zero = 0   buckets are all-reduced, every rank updates everything
    zero = 1   buckets are reduce-scattered, each rank updates its shard, parameters are all-gathered (Rajbhandari 2020)

Gradients are summed, never averaged: the loss is already divided by the global count of tokens. Parameters of which
some replica within the model holds only a part of the gradient's sum (norms under sequence parallelism, shared
key/value heads, tied embeddings on two stages) form buckets of their own, which are reduced last.

The seam for ZeRO-2 and ZeRO-3: nothing outside this file knows how a bucket's storage is held.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.mesh import Group, Mesh, Work
from megalite.placement import Box, PlacedParameter, placed_parameters

Pairs = list[tuple[PlacedParameter, Box]]

_ALIGNMENT = 64
"""Elements; keeps every shard's start on a cache line."""


@dataclass(frozen=True)
class Slot:
    """A parameter's place in its bucket: elements [start, start + numel), row-major."""

    parameter: PlacedParameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


class Bucket:
    """Some parameters in one flat buffer, with their gradients; decaying parameters first, then the others."""

    def __init__(self, parameters: list[PlacedParameter], group: Group, zero: int, *, deferred: bool) -> None:
        ordered = sorted(parameters, key=lambda parameter: not parameter.decays)
        self.group, self.zero, self.deferred = group, zero, deferred
        self.slots: list[Slot] = []
        for parameter in ordered:
            start = self.slots[-1].stop if self.slots else 0
            if self.slots and self.slots[-1].parameter.decays != parameter.decays:
                # Vectorised updates round the last few elements of a range differently: those are to be padding.
                start = -(-start // _ALIGNMENT) * _ALIGNMENT
            self.slots.append(Slot(parameter, start))
        unit = _ALIGNMENT * group.size
        length = -(-self.slots[-1].stop // unit) * unit
        self.decaying = next((slot.start for slot in self.slots if not slot.parameter.decays), length)
        first = ordered[0]
        self.parameters = torch.zeros(length, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros(length, dtype=torch.float32, device=first.device)
        self.shard = slice(group.index * length // group.size, (group.index + 1) * length // group.size)
        separate = zero > 0 and group.size > 1
        self.shard_gradients = torch.zeros_like(self.gradients[self.shard]) if separate else self.gradients[self.shard]
        self._pending = 0
        self._work: Work | None = None
        for slot in self.slots:
            self._adopt(slot)

    @torch.no_grad()
    def _adopt(self, slot: Slot) -> None:
        """Move the parameter's storage into the bucket and point its gradient here."""
        parameter, span = slot.parameter, slice(slot.start, slot.stop)
        self.parameters[span] = parameter.flatten()
        parameter.data = self.parameters[span].view(parameter.shape)
        parameter.main_grad = self.gradients[span].view(parameter.shape)

    @property
    def updated(self) -> slice:
        """The elements that this rank's optimizer updates."""
        return self.shard if self.zero > 0 else slice(0, len(self.parameters))

    @property
    def updated_gradients(self) -> Tensor:
        return self.shard_gradients if self.zero > 0 else self.gradients

    def expect(self) -> None:
        """The next backward pass is the last: every parameter will report its final gradient once."""
        self._pending = len(self.slots)

    def arrive(self) -> bool:
        """One parameter's gradient is final; True when it was the last of the bucket."""
        self._pending -= 1
        return self._pending == 0

    def launch(self) -> None:
        """Start the reduction over the data-parallel ranks."""
        if self.zero > 0:
            if self.group.size > 1:
                self._work = self.group.reduce_scatter(self.shard_gradients, self.gradients)
        else:
            self._work = self.group.all_reduce(self.gradients)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def gather_parameters(self) -> Work | None:
        """Start to share the updated shards (ZeRO); the caller waits before the next forward."""
        if self.zero == 0 or self.group.size == 1:
            return None
        return self.group.all_gather(self.parameters, self.parameters[self.shard].clone())


def _tensor_replicas(parameter: PlacedParameter) -> bool:
    """Whether some replica within the model holds only a part of this parameter's gradient."""
    return any(box.partial for box in parameter.placement.boxes)


class StageBuckets:
    """All buckets of one pipeline stage, and the order in which their gradients become whole.

    `begin()` clears the gradients; `expect_last_backward()` before the stage's last backward pass lets buckets be
    reduced under it; `sum_tied()` adds the two gradients of a tied embedding; `finish()` completes everything.
    """

    def __init__(self, stage: nn.Module, mesh: Mesh, *, zero: int, bucket_elements: int = 1 << 23) -> None:
        self.mesh = mesh
        group = mesh.group("dp", "cp")
        parameters = list(placed_parameters(stage))
        self.aliases = [parameter for parameter in parameters if parameter.tied_to is not None]
        own = [parameter for parameter in reversed(parameters) if parameter.tied_to is None]
        prompt = [parameter for parameter in own if not self._deferred(parameter)]
        late = [parameter for parameter in own if self._deferred(parameter)]
        self.buckets = [Bucket(part, group, zero, deferred=False) for part in _cut(prompt, bucket_elements)]
        self.buckets += [Bucket(part, group, zero, deferred=True) for part in _cut(late, bucket_elements)]
        for alias in self.aliases:
            assert alias.tied_to is not None
            alias.data = alias.tied_to.data
            alias.main_grad = torch.zeros(alias.shape, dtype=torch.float32, device=alias.device)
        self._listening = False
        self._launched = 0
        self._full: set[int] = set()
        for index, bucket in enumerate(self.buckets):
            for slot in bucket.slots:
                slot.parameter.listen(functools.partial(self._arrived, index))
                slot.parameter.register_post_accumulate_grad_hook(_move_gradient)
        within, across = self._partial_boxes(own)
        self._replicated = _by_replicas(within, mesh.group("tp"))
        self._tied = _by_replicas(across, mesh.group("pp"))

    def _deferred(self, parameter: PlacedParameter) -> bool:
        return _tensor_replicas(parameter) or any(alias.tied_to is parameter for alias in self.aliases)

    def _partial_boxes(self, parameters: Iterable[PlacedParameter]) -> tuple[Pairs, Pairs]:
        """(parameter, box) pairs to be summed over replicas, within this stage and across stages."""
        within: Pairs = []
        across: Pairs = []
        stage_ranks = set(self.mesh.ranks_along("tp"))
        for parameter in parameters:
            for box in parameter.placement.boxes:
                if box.partial:
                    (within if set(box.replicas) <= stage_ranks else across).append((parameter, box))
        return within, across

    def begin(self) -> None:
        """Clear the gradients before a step's first forward pass."""
        for bucket in self.buckets:
            bucket.gradients.zero_()
        for alias in self.aliases:
            assert alias.main_grad is not None
            alias.main_grad.zero_()
        self._launched, self._listening = 0, False
        self._full.clear()

    def expect_last_backward(self) -> None:
        for bucket in self.buckets:
            bucket.expect()
        self._listening = True

    def _arrived(self, index: int) -> None:
        if not self._listening or not self.buckets[index].arrive():
            return
        self._full.add(index)
        # Launched strictly in order, so that all ranks of the group start the same collectives in the same order.
        while self._launched in self._full and not self.buckets[self._launched].deferred:
            self.buckets[self._launched].launch()
            self._launched += 1

    def sum_tied(self) -> None:
        """Add the output layer's gradient to the embedding's (and back), whether they live here or on two stages."""
        for alias in self.aliases:
            assert alias.tied_to is not None and alias.tied_to.main_grad is not None and alias.main_grad is not None
            alias.tied_to.main_grad.add_(alias.main_grad)
        for shared in self._tied:
            shared.sum_gradients()

    def finish(self) -> None:
        """Sum what replicas within the stage share, reduce the remaining buckets, wait for all."""
        self._listening = False
        for shared in self._replicated:
            shared.sum_gradients()
        for bucket in self.buckets[self._launched :]:
            bucket.launch()
        self._launched = len(self.buckets)
        for bucket in self.buckets:
            bucket.wait()

    def gather_parameters(self) -> None:
        """After the optimizer's step: every rank gets every shard's new parameters."""
        started = [work for bucket in self.buckets if (work := bucket.gather_parameters()) is not None]
        for work in started:
            work.wait()


def _move_gradient(parameter: Tensor) -> None:
    """Add a gradient that autograd computed (norms) to `main_grad`."""
    assert isinstance(parameter, PlacedParameter)
    if parameter.grad is not None and parameter.main_grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
        parameter.gradient_accumulated()


def _cut(parameters: list[PlacedParameter], limit: int) -> Iterator[list[PlacedParameter]]:
    """Runs of at most `limit` elements (a larger parameter alone): small enough to fill while backward goes on."""
    part: list[PlacedParameter] = []
    for parameter in parameters:
        if part and sum(other.numel() for other in part) + parameter.numel() > limit:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


@dataclass(frozen=True)
class SharedBoxes:
    """Boxes that the same ranks share (`members` of `group`), in an order on which those ranks agree."""

    group: Group
    members: tuple[int, ...]
    boxes: tuple[tuple[PlacedParameter, Box], ...]

    def sum_gradients(self) -> None:
        """Every member gets the sum of the members' gradients: one message."""
        views = []
        for parameter, box in self.boxes:
            assert parameter.main_grad is not None
            views.append(box.view(parameter.main_grad))
        packed = torch.cat([view.reshape(-1) for view in views])
        self.group.sum_among(packed, self.members)
        for view, total in zip(views, packed.split([view.numel() for view in views])):
            view.copy_(total.view(view.shape))


def _by_replicas(pairs: Pairs, group: Group) -> list[SharedBoxes]:
    shared: dict[tuple[int, ...], list[tuple[PlacedParameter, Box]]] = {}
    for parameter, box in pairs:
        shared.setdefault(box.replicas, []).append((parameter, box))
    return [
        SharedBoxes(
            group,
            tuple(group.ranks.index(rank) for rank in replicas),
            tuple(sorted(shared[replicas], key=lambda pair: (pair[1].name, pair[1].offset))),
        )
        for replicas in sorted(shared)
    ]
