"""Data parallelism: the buckets of a pipeline stage, reduced while backward still runs, and ZeRO-1 to 3.

The parameters of one pipeline stage are stored in flat buckets (`megalite.parallel.buckets`), each of one role, roughly
in the order in which backward finishes them: matrices (the output layer first, the embedding last), then vectors, then
parameters with partial gradients, whose replicas within the model must be summed first (norms under sequence
parallelism, shared key/value heads, tied embeddings on two stages). These last are summed and reduced at the end of the
step. Vectors and parameters with partial gradients stay unsharded under ZeRO-2 and 3: vectors are small, and the sum
over replicas needs full tensors.

Gradients are summed, never averaged: the loss is already divided by the global token count.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megalite.mesh import Group, Mesh
from megalite.parallel.buckets import Bucket, ShardedBucket
from megalite.placement import Action, Box, PlacedParameter, placed_parameters

Kind = TypeVar("Kind", bound=tuple[Any, ...])

Pairs = list[tuple[PlacedParameter, Box]]

BUCKET_ELEMENTS = 1 << 23
"""Gradients reduced together; a single larger parameter has a bucket of its own."""

IN_FLIGHT = 2
"""ZeRO-2 and 3: maximum number of reductions in flight, each with a full gradient buffer."""


ROLES = ("output", "matrix", "adapter", "embedding", "vector")
"""A bucket holds parameters of one role; in this order backward finishes them."""


def _turn(parameter: PlacedParameter) -> int:
    """The parameter's role as its place among `ROLES`; others come last."""
    role = parameter.placement.role
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _has_partial_boxes(parameter: PlacedParameter) -> bool:
    """Whether this parameter's gradient must be summed over replicas within the model."""
    return any(box.partial for box in parameter.placement.boxes)


class StageBuckets:
    """All buckets of one pipeline stage, and the order in which their gradients are reduced.

    `begin()` forgets the gradients; backward passes then report parameter by parameter, and full buckets are reduced
    while backward continues; `sum_tied()` adds the two gradients of a tied embedding; `finish()` starts the remaining
    reductions and `wait()` completes all. Where backward is split in two, `delaying` collects the weight-gradient part
    and `run_delayed` runs it.

    `aliases` are parameters of this rank's stages that share the storage of another parameter (tied embeddings).
    """

    def __init__(
        self,
        stage: nn.Module,
        mesh: Mesh,
        *,
        zero: int,
        bucket_elements: int = BUCKET_ELEMENTS,
        aliases: Iterable[PlacedParameter] = (),
    ) -> None:
        self.mesh = mesh
        parameters = list(placed_parameters(stage))
        own = [parameter for parameter in parameters if parameter.tied_to is None]
        mine = set(map(id, own))
        self.aliases = [alias for alias in aliases if id(alias.tied_to) in mine]
        self.buckets = list(self._build_buckets(stage, own, zero, bucket_elements))
        for alias in self.aliases:
            assert alias.tied_to is not None
            alias.data = alias.tied_to.data
            if alias.requires_grad:
                alias.main_grad = torch.zeros(alias.shape, dtype=torch.float32, device=alias.device)
        self.trained = [bucket for bucket in self.buckets if bucket.trained]
        self._matrices = [parameter for parameter in own if parameter.decays]
        self._by_use = _in_order_of_use(self.buckets, own)
        self._in_order = [bucket for bucket in self.trained if not isinstance(bucket, ShardedBucket)]
        self._launched = 0
        self._full: set[int] = set()
        self._flying: deque[Bucket] = deque()
        self._delayed: dict[int, list[Action]] = {}
        self._window = _Window(_layers_in_order(stage, self.buckets))
        for bucket in self.trained:
            bucket.on_complete = functools.partial(self._complete, bucket)
            for slot in bucket.slots:
                slot.parameter.register_post_accumulate_grad_hook(_move_gradient)
        within, across = self._partial_boxes(own)
        self._replicated = _by_replicas(within, mesh.group("tp"))
        self._tied = _by_replicas(across, mesh.group("pp"))

    def _build_buckets(self, stage: nn.Module, own: list[PlacedParameter], zero: int, limit: int) -> Iterator[Bucket]:
        shared = {id(alias.tied_to) for alias in self.aliases}

        def is_late(parameter: PlacedParameter) -> bool:
            return parameter.requires_grad and (_has_partial_boxes(parameter) or id(parameter) in shared)

        late = [parameter for parameter in reversed(own) if is_late(parameter)]
        prompt = [parameter for parameter in reversed(own) if not is_late(parameter)]
        for (axes, frozen, _, _), alike in _grouped(
            prompt, lambda p: (p.placement.reduce, not p.requires_grad, str(p.dtype), _turn(p))
        ):
            group = self.mesh.group(*axes)
            matrices = [parameter for parameter in alike if parameter.decays]
            sharded = group.size > 1 and (zero == 3 if frozen else zero > 1)
            for part in _by_layer(stage, matrices) if sharded else _cut(matrices, limit):
                yield (ShardedBucket if sharded else Bucket)(part, group, zero, deferred=False)
            for part in _cut([parameter for parameter in alike if not parameter.decays], limit):
                yield Bucket(part, group, min(zero, 1), deferred=False)
        for (axes, _, _), alike in _grouped(late, lambda p: (p.placement.reduce, not p.decays, _turn(p))):
            for part in _cut(alike, limit):
                yield Bucket(part, self.mesh.group(*axes), min(zero, 1), deferred=True)

    def _partial_boxes(self, parameters: Iterable[PlacedParameter]) -> tuple[Pairs, Pairs]:
        """(parameter, box) pairs to be summed over replicas, within this stage and across stages."""
        within: Pairs = []
        across: Pairs = []
        stage_ranks = set(self.mesh.ranks_along("tp"))
        for parameter in parameters:
            for box in parameter.placement.boxes:
                if box.partial and parameter.requires_grad:
                    (within if set(box.replicas) <= stage_ranks else across).append((parameter, box))
        return within, across

    def begin(self, micro_batches: int) -> None:
        """Forget the gradients before the first forward pass of a step of `micro_batches` micro-batches."""
        for bucket in self.trained:
            bucket.begin(micro_batches)
        for alias in self.aliases:
            alias.stale = alias.main_grad is not None
        self._launched = 0
        self._full.clear()

    def _complete(self, bucket: Bucket) -> None:
        if bucket.deferred:
            return
        if isinstance(bucket, ShardedBucket):
            self._launch(bucket)
            return
        self._full.add(id(bucket))
        # Launched strictly in order: all ranks of the group must start the same collectives in the same order.
        while self._launched < len(self._in_order) and id(self._in_order[self._launched]) in self._full:
            self._in_order[self._launched].launch()
            self._launched += 1

    def _launch(self, bucket: Bucket) -> None:
        """Start to reduce a bucket; waits for the oldest reduction if too many are in flight, to bound memory."""
        bucket.launch()
        self._flying.append(bucket)
        while len(self._flying) > IN_FLIGHT:
            self._flying.popleft().wait()

    @contextlib.contextmanager
    def delaying(self, micro: int) -> Iterator[None]:
        """Backward passes in this context leave the matrices' weight gradients to `run_delayed(micro)`."""
        work = self._delayed[micro] = []
        for parameter in self._matrices:
            parameter.delay = work.append
        try:
            yield
        finally:
            for parameter in self._matrices:
                parameter.delay = None

    @torch.no_grad()
    def run_delayed(self, micro: int) -> None:
        """Compute the delayed weight gradients of a micro-batch; each frees what it was kept for."""
        delayed = deque(self._delayed.pop(micro))
        while delayed:
            delayed.popleft()()

    def sum_tied(self) -> None:
        """Sum the gradients of embedding and tied output layer, whether both are here or on two stages."""
        for alias in self.aliases:
            gradient = alias.grad_buffer()
            if gradient is not None:
                assert alias.tied_to is not None
                total = alias.tied_to.grad_buffer()
                assert total is not None
                total.add_(gradient)
        for shared in self._tied:
            shared.sum_gradients()

    def finish(self) -> None:
        """After the stage's last backward: sum partial gradients within the stage and start the remaining reductions.

        Nothing waits for them here, since this rank's other stages may still have work to do; `wait` does.
        """
        for shared in self._replicated:
            shared.sum_gradients()
        for bucket in self.trained:
            if isinstance(bucket, ShardedBucket):
                bucket.launch()
        for bucket in self._in_order[self._launched :]:
            bucket.launch()
        self._launched = len(self._in_order)

    def wait(self) -> None:
        """Wait for all reductions; before, gradients must be neither read nor cleared."""
        self._flying.clear()
        for bucket in self.trained:
            bucket.wait()

    def wait_for_all_gather(self) -> None:
        """Wait for all parameters; needed before they are read or written outside a forward pass."""
        for bucket in self.buckets:
            bucket.wait_for_all_gather()

    @torch.no_grad()
    def fill(self, write: Callable[[PlacedParameter], object], trained: bool | None = None) -> None:
        """Call `write` for every parameter (or those alone that are trained, or not), which it must overwrite; under
        ZeRO-3 one bucket at a time is unsharded."""
        self.wait_for_all_gather()
        self._window.clear()
        for bucket in self.buckets:
            if trained is not None and bucket.trained != trained:
                continue
            bucket.open()
            for slot in bucket.slots:
                write(slot.parameter)
            bucket.close()
            bucket.derived.clear()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """In this context every parameter is unsharded and can be read, also by forward passes."""
        self.wait_for_all_gather()
        for bucket in self._window.buckets:
            bucket.unshard()
        self.wait_for_all_gather()
        self._window.pinned = True
        try:
            yield
        finally:
            self._window.pinned = False
            self._window.clear()


def gather_parameters(stages: Iterable[StageBuckets]) -> None:
    """All-gather the updated parameters of a rank's stages (in forward order) after the optimizer step.

    On a GPU the operations of a group run in the order in which they were started, and a wait is for all before it.
    So what has to be there at once comes first: vectors, which layers read without asking, of all stages. Matrices
    follow in the order in which the next forward pass asks for them, and are waited for there.
    """
    stages = list(stages)
    for stage in stages:
        stage._window.clear()
    at_once = [bucket for stage in stages for bucket in stage._by_use if _read_at_once(bucket)]
    for bucket in at_once:
        bucket.gather_parameters()
    for stage in stages:
        for bucket in stage._by_use:
            if not _read_at_once(bucket):
                bucket.gather_parameters()
    for bucket in at_once:
        bucket.wait_for_all_gather()


def _read_at_once(bucket: Bucket) -> bool:
    """Whether its parameters are read without `PlacedParameter.gathered`: vectors, and aliases of tied ones."""
    return bucket.deferred or not bucket.decays


def _in_order_of_use(buckets: Iterable[Bucket], parameters: Iterable[PlacedParameter]) -> list[Bucket]:
    """The buckets in the order in which a forward pass first needs one of their `parameters`, given in its order."""
    place = {id(parameter): number for number, parameter in enumerate(parameters)}
    return sorted(buckets, key=lambda bucket: min(place[id(slot.parameter)] for slot in bucket.slots))


class _Window:
    """Which layers of a stage are unsharded under ZeRO-3: the one in use, and the next one (prefetch).

    Layers request their weights at each use, in any order of stages, micro-batches and recomputation. Forward passes go
    up through the layers, backward passes down, turning around at both ends. `layers` are the buckets of each layer in
    forward order; while `pinned`, all stay unsharded.
    """

    def __init__(self, layers: list[list[ShardedBucket]]) -> None:
        self.layers = layers
        self.pinned = False
        self._at = -1
        self._whole: set[int] = set()
        for index, buckets in enumerate(layers):
            for bucket in buckets:
                bucket.on_use = functools.partial(self._use, index)

    @property
    def buckets(self) -> Iterator[ShardedBucket]:
        return itertools.chain.from_iterable(self.layers)

    def _use(self, index: int) -> None:
        if index == self._at or self.pinned:
            return
        # No one says whether this is forward or backward, so the direction is inferred: a higher layer than the last
        # one means forward; after the last layer the next is below, and after the first it is above. The layer in use
        # is gathered before the prefetched one: what is waited for now must not queue behind what is needed later.
        last = len(self.layers) - 1
        up = index == 0 or (index != last and index > self._at)
        wanted = {index, min(index + 1, last) if up else max(index - 1, 0)}
        for other in self._whole - wanted:
            for bucket in self.layers[other]:
                bucket.release()
        for other in sorted(wanted, key=lambda other: other != index):
            for bucket in self.layers[other]:
                bucket.unshard()
        self._at, self._whole = index, wanted

    def clear(self) -> None:
        """Release everything: the shards have changed, or are about to."""
        for bucket in self.buckets:
            bucket.release()
        self._at, self._whole = -1, set()


def _move_gradient(parameter: Tensor) -> None:
    """Move a gradient computed by autograd (norms) to `main_grad`."""
    assert isinstance(parameter, PlacedParameter)
    if parameter.grad is None:
        return
    total = parameter.grad_buffer()
    if total is not None:
        total.add_(parameter.grad)
        parameter.grad = None
        parameter.gradient_added()


def _cut(parameters: list[PlacedParameter], limit: int) -> Iterator[list[PlacedParameter]]:
    """Runs of at most `limit` elements (a larger parameter alone): small enough to overlap with backward."""
    part: list[PlacedParameter] = []
    for parameter in parameters:
        if part and sum(other.numel() for other in part) + parameter.numel() > limit:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


def _grouped(
    parameters: list[PlacedParameter], kind: Callable[[PlacedParameter], Kind]
) -> list[tuple[Kind, list[PlacedParameter]]]:
    """The parameters of each kind, in order of the kinds."""
    groups: dict[Kind, list[PlacedParameter]] = {}
    for parameter in parameters:
        groups.setdefault(kind(parameter), []).append(parameter)
    return sorted(groups.items(), key=lambda item: item[0])


def _homes(stage: nn.Module) -> dict[int, str]:
    """By parameter id, the layer it belongs to (`layers.3`), or its own name if none."""
    homes = {}
    for name, parameter in stage.named_parameters():
        module, _, rest = name.partition(".")
        homes[id(parameter)] = f"{module}.{rest.split('.')[0]}" if module == "layers" else name
    return homes


def _by_layer(stage: nn.Module, parameters: list[PlacedParameter]) -> Iterator[list[PlacedParameter]]:
    """Group parameters by layer; one outside all layers is a group of its own. A forward pass uses a group at once."""
    homes = _homes(stage)
    for _, layer in itertools.groupby(parameters, lambda parameter: homes[id(parameter)]):
        yield list(layer)


def _layers_in_order(stage: nn.Module, buckets: Iterable[Bucket]) -> list[list[ShardedBucket]]:
    """The resharded buckets of each layer, in forward order."""
    homes = _homes(stage)
    layers: dict[str, list[ShardedBucket]] = {home: [] for home in homes.values()}
    for bucket in buckets:
        if isinstance(bucket, ShardedBucket) and bucket.reshards:
            layers[homes[id(bucket.slots[0].parameter)]].append(bucket)
    return [layer for layer in layers.values() if layer]


@dataclass(frozen=True)
class SharedBoxes:
    """Boxes shared by the same ranks (`members` of `group`), in an order those ranks agree on."""

    group: Group
    members: tuple[int, ...]
    boxes: tuple[tuple[PlacedParameter, Box], ...]

    def sum_gradients(self) -> None:
        """Give every member the sum of the members' gradients, in one message."""
        views = []
        for parameter, box in self.boxes:
            total = parameter.grad_buffer()
            assert total is not None
            views.append(box.view(total))
        packed = torch.cat([view.reshape(-1) for view in views])
        self.group.sum_over_members(packed, self.members)
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
