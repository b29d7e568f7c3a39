"""Types of a training step on any mesh, from one rank of it, by the package spmd-types.

Along each axis of the mesh a tensor is R replicated (its gradient is P), I invariant (replicated, and so is its
gradient), V varying, or P partial (one term of a sum; its gradient is replicated). Parameters get their types from
their placements: R along the axes over which their gradient is summed. Operations of torch, objectives, and the
project's autograd functions by the declaration `spmd` beside each are then checked for every axis; one rank runs,
with groups that send nothing, and what it would receive is typed as what was asked for.

A declaration such as "x: V|I, weight: V -> V" has, for the axis of the function's own group, the type of each tensor
that it differentiates, and of its output; "V|I" is V under sequence parallelism and I otherwise. An output may be the
name of an argument whose type it has along every axis. What follows "; data" is the output's type along the data axes,
where it does not follow from the arguments. Along all other axes the usual rules hold. "local": no group of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from spmd_types import (
    MeshAxis,
    SpmdTypeError,
    get_local_type,
    register_local_autograd_function,
    rules,
    set_current_mesh,
)
from spmd_types._checker import infer_local_type_for_axis
from spmd_types.checker import typecheck
from spmd_types.runtime import _set_local_type
from spmd_types.types import I, P, R, V
from torch import Tensor
from torch.autograd import Function
from torch.overrides import _get_current_function_mode_stack

import megalite
from megalite.config import Config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.mesh import DATA_AXES, DONE, Group, Mesh, Work
from megalite.model.router import Router
from megalite.objective import Objective
from megalite.parallel.context import ContextRegion
from megalite.parallel.engine import PipelineEngine
from megalite.parallel.experts import Sorting
from megalite.parallel.zero import StageBuckets
from megalite.placement import PlacedParameter, placed_parameters
from megalite.train.trainer import Trainer

LETTERS = {"R": R, "I": I, "V": V, "P": P}

AXES = ("dp", "ep", "cp", "tp")
"""Along `pp` every tensor is another one."""

Types = dict[str, Any]


def functions() -> Iterator[type[Function]]:
    """The project's autograd functions, those of the kernels included."""
    for module in pkgutil.walk_packages(megalite.__path__, "megalite."):
        if module.name.startswith(("megalite.parallel.", "megalite.model.")):
            importlib.import_module(module.name)
    todo = list(Function.__subclasses__())
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__.startswith("megalite."):
            yield cls


def is_local(cls: type[Function]) -> bool:
    """Kernels know no groups."""
    return cls.__module__.startswith("megalite.kernels")


def parse(declaration: str) -> dict[str, str]:
    """A declaration as types by argument, with `out` and `data`; empty for "local"."""
    if declaration == "local":
        return {}
    types, _, data = declaration.partition("; data ")
    arguments, _, out = types.partition(" -> ")
    parsed = dict(pair.split(": ") for pair in arguments.split(", ")) | {"out": out}
    return parsed | ({"data": data} if data else {})


class TypedMesh:
    """A mesh whose axes spmd-types knows."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        stride, axes = 1, {}
        for name in reversed(AXES):
            size = getattr(mesh, name)
            axes[name] = MeshAxis.of(size, stride)
            stride *= size
        self.axes: dict[str, MeshAxis] = {name: axis for name, axis in axes.items() if axis.size() > 1}

    def type_of(self, tensor: Tensor) -> Types:
        found = get_local_type(tensor)
        return {name: found[axis] for name, axis in self.axes.items() if axis in found}

    def give(self, tensor: Tensor, types: Types) -> None:
        _set_local_type(tensor, {self.axes[name]: kind for name, kind in types.items() if name in self.axes})

    def whole(self, kind: Any, **others: Any) -> Types:
        """`kind` along every axis but the `others`."""
        return {name: others.get(name, kind) for name in self.axes}

    def of_group(self, group: Group) -> list[str]:
        """The axes along which the group's ranks lie."""
        return [
            name
            for name in self.axes
            if any(r in group.ranks for r in set(self.mesh.ranks_along(name)) - {self.mesh.rank})
        ]

    def of_parameter(self, parameter: PlacedParameter) -> Types:
        """What the placement says of the gradient: summed over an axis, equal along it, or of other elements."""
        types = self.whole(V)
        for name in self.axes:
            if name in parameter.placement.reduce:
                types[name] = R
        along = set(self.mesh.ranks_along("tp"))
        boxes = parameter.placement.boxes
        if "tp" in self.axes and boxes and all(along <= set(box.replicas) for box in boxes):
            types["tp"] = R if boxes[0].partial else I
        return types


class TypedGroup(Group):
    """Sends nothing. Outside autograd functions it types what a collective changes, and refuses what makes no sense."""

    typed: TypedMesh

    def _retype(
        self, what: str, tensor: Tensor, allowed: Sequence[Any], becomes: Any, output: Tensor | None = None
    ) -> None:
        if not _get_current_function_mode_stack():
            return
        types = self.typed.type_of(tensor)
        for name in self.typed.of_group(self):
            if types[name] not in allowed:
                raise SpmdTypeError(f"{what} over {name} of a tensor that is {types[name]} along it")
            types[name] = becomes
        self.typed.give(tensor if output is None else output, types)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        if self.size > 1:
            self._retype("all_reduce", tensor, (V, P), R)
        return DONE

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        with torch.no_grad():
            output.view(-1).copy_(tensor.reshape(-1).repeat(self.size))
        self._retype("all_gather", tensor, (V,), R, output)
        return DONE

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Work:
        with torch.no_grad():
            output.view(-1).copy_(tensor.reshape(self.size, -1)[0])
        self._retype("reduce_scatter", tensor, (V, P), V, output)
        return DONE

    def all_to_all(self, output: Tensor, tensor: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Work:
        with torch.no_grad():
            if output.shape == tensor.shape:
                output.copy_(tensor)
            else:
                output.zero_()
        self._retype("all_to_all", tensor, (V,), V, output)
        return DONE

    def pass_on(self, output: Tensor, tensor: Tensor) -> Work:
        with torch.no_grad():
            output.copy_(tensor)
        return DONE


def _own_region(arguments: dict[str, Any]) -> Any:
    """What has the group that a function communicates in: a region, a group, or something that has one."""
    for value in arguments.values():
        for _ in range(3):
            if isinstance(value, Group):
                return value
            if (hasattr(value, "group") and hasattr(value, "size")) or hasattr(value, "leaving"):
                return value
            inner = next((getattr(value, name) for name in ("region", "layer") if hasattr(value, name)), None)
            if inner is None:
                break
            value = inner
    return None


def hook(cls: type[Function], typed: TypedMesh) -> Any:
    """The `spmd_typecheck` of a function, from its declaration."""
    declared = parse(cls.spmd)  # type: ignore[attr-defined]
    names = list(inspect.signature(cls.forward).parameters)[1:]

    def check(outputs: Any, **arguments: Any) -> None:
        region = _own_region(arguments)
        group = region if isinstance(region, Group) else getattr(region, "group", None)
        own = typed.of_group(group) if group is not None and group.size > 1 else []
        sequence = bool(getattr(region, "sequence", False))
        tensors = [(name, tensor) for name, value in arguments.items() for tensor in _tensors(value)]
        rules.ignore(*(tensor for _, tensor in tensors))
        result: Types = {}
        for axis in typed.axes:
            if axis in own and declared:
                for name, tensor in tensors:
                    if name == declared.get("out"):
                        continue
                    _check_argument(cls, name, tensor, declared.get(name), axis, typed, sequence)
            if declared.get("out") in arguments:
                result[axis] = typed.type_of(arguments[declared["out"]])[axis]
            elif axis in own and "out" in declared:
                result[axis] = _letter(declared["out"], sequence)[0]
            else:
                kinds = [typed.type_of(tensor)[axis] for _, tensor in tensors]
                free = [not tensor.requires_grad for _, tensor in tensors]
                result[axis] = infer_local_type_for_axis(typed.axes[axis], kinds, no_grad=free)
                if axis in DATA_AXES and "data" in declared and result[axis] is V:
                    result[axis] = _letter(declared["data"], sequence)[0]
        for output in _tensors(outputs):
            typed.give(output, result)

    parameters = [inspect.Parameter("outputs", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    check.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return staticmethod(check)


def _letter(declared: str, sequence: bool) -> list[Any]:
    """The types that a declaration allows: of a pair with sequence parallelism the first, else the second."""
    pair = declared.split("|")
    return [LETTERS[pair[0] if sequence or len(pair) == 1 else pair[1]]]


def _check_argument(
    cls: type, name: str, tensor: Tensor, declared: str | None, axis: str, typed: TypedMesh, sequence: bool
) -> None:
    kind = typed.type_of(tensor)[axis]
    if declared is None:
        if tensor.requires_grad:
            raise SpmdTypeError(f"{cls.__name__} declares no type for its argument {name}, which has a gradient")
        return
    allowed = _letter(declared, sequence)
    if P in allowed:
        allowed = [*allowed, V]  # a varying term of the sum
    if not tensor.requires_grad and {R, I} & set(allowed):
        allowed = [*allowed, R, I]
    if kind not in allowed:
        raise SpmdTypeError(f"{cls.__name__}: {name} is {kind} along {axis}, and declared {allowed[0]}")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


@contextlib.contextmanager
def declarations(typed: TypedMesh) -> Iterator[None]:
    """Within, spmd-types reads the project's declarations."""
    with contextlib.ExitStack() as stack:
        for cls in functions():
            if is_local(cls):
                register_local_autograd_function(cls)
            else:
                stack.enter_context(mock.patch.object(cls, "spmd_typecheck", hook(cls, typed), create=True))
        yield


class _Checked:
    """An objective whose scale is looked at."""

    def __init__(self, objective: Objective, typed: TypedMesh) -> None:
        self.objective, self.typed = objective, typed
        self.reads, self.metrics = objective.reads, objective.metrics
        if hasattr(objective, "temperature"):
            self.temperature = objective.temperature

    def units(self, batch: Batch) -> Tensor:
        return self.objective.units(batch)

    def loss(self, outputs: Any, batch: Batch, scale: Any) -> Any:
        for axis, kind in self.typed.type_of(scale).items():
            if kind not in (R, I):
                raise SpmdTypeError(f"the scale of the loss is {kind} along {axis}: ranks divide by other counts")
        return self.objective.loss(outputs, batch, scale)


@contextlib.contextmanager
def _own_types(typed: TypedMesh) -> Iterator[None]:
    """Within, what types of one rank cannot follow is typed by hand: a rank's rows of a split sequence, whole numbers
    that sort, what backward records, and units, which one of the ranks that hold a sequence counts."""
    rows, sort, router_loss, own_units = ContextRegion.rows, Sorting.of, Router._loss, Trainer._own_units

    def terms(trainer: Trainer, batches: Any, objective: Objective) -> Tensor:
        units = own_units(trainer, batches, objective)
        typed.give(units, typed.whole(V))
        return units

    def own_rows(region: ContextRegion, length: int, index: int | None = None) -> Tensor:
        found = rows(region, length, index)
        if region.size > 1:
            typed.give(found, typed.whole(R, cp=V))
        return found

    def own_order(keys: Tensor) -> Sorting:
        keys = keys.clone()  # whole numbers have no gradient: R and I are one
        typed.give(keys, {axis: R if kind is I else kind for axis, kind in typed.type_of(keys).items()})
        return sort(keys)

    def recorded(router: Router, logits: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
        loss = router_loss(router, logits, scores, counts)
        router.record(counts.sum(0), loss.detach())
        return loss

    with (
        mock.patch.object(ContextRegion, "rows", own_rows),
        mock.patch.object(Sorting, "of", own_order),
        mock.patch.object(Router, "_loss", recorded),
        mock.patch.object(Trainer, "_own_units", terms),
        mock.patch.object(StageBuckets, "begin", lambda buckets, micro_batches: None),
    ):
        yield


def _typed_trainer(config: Config, typed: TypedMesh, objective: Objective | None) -> Trainer:
    """A trainer whose groups send nothing and whose parameters have the types of their placements."""
    group_class = type("Typed", (TypedGroup,), {"typed": typed})
    object.__setattr__(typed.mesh, "make_group", lambda ranks, rank: group_class(ranks, rank, None))
    kernels = select_kernels({"default": "reference", "attention": "sdpa"}, typed.mesh.device)
    trainer = Trainer(config, typed.mesh, kernels, objective=objective)
    trainer.initialise()
    for stage in trainer.stages.values():
        for parameter in placed_parameters(stage):
            typed.give(parameter, typed.of_parameter(parameter))
        for buffer in stage.buffers():
            typed.give(buffer, typed.whole(R))
    return trainer


def check_step(config: Config, mesh: Mesh, objective: Objective | None = None) -> Types:
    """Type the forward pass, the loss and the counts of a step on this rank; the types of its loss, or of what its last
    stage sends on. Raises SpmdTypeError."""
    typed = TypedMesh(mesh)
    trainer = _typed_trainer(config, typed, objective)
    stream = typed.whole(V, tp=V if mesh.tp > 1 and config.parallel.sequence else I)
    batches = [_batch(trainer, typed)] * 2
    # What reads whole sequences is the same on all ranks that share them; terms of the loss are summed over the others.
    local = trainer.objective.reads == "loss"
    loss = typed.whole(P if local else V, tp=I, cp=P if local else I)
    sent: Types = {}

    def run(engine: PipelineEngine, forward: Any, buckets: Any = None, observe: Any = None) -> dict[int, Tensor]:
        losses: dict[int, Tensor] = {}
        for number, micro in itertools.product(trainer.stages, range(len(batches))):
            hidden = torch.ones(engine.activation.shape).requires_grad_() if number > 0 else None
            if hidden is not None:
                typed.give(hidden, stream)
            output = forward(number, micro, hidden)
            sent.update(typed.type_of(output))
            last = number == trainer.stage_count - 1
            if last:
                losses[micro] = output
            expect(sent, loss if last else stream, "the loss" if last else f"what stage {number} sends")
        return losses

    with (
        declarations(typed),
        _own_types(typed),
        mock.patch.object(PipelineEngine, "run", run),
        set_current_mesh(typed.axes),
        typecheck(),
    ):
        trainer.accumulate(batches, _Checked(trainer.objective, typed))
    return sent


def expect(types: Types, wanted: Types, what: str) -> None:
    if types != wanted:
        raise SpmdTypeError(f"{what} is {types}, not {wanted}")


def _batch(trainer: Trainer, typed: TypedMesh) -> Batch:
    (rows, length), vocabulary = trainer.shape, trainer.config.model.vocab_size
    tokens, labels = torch.randint(vocabulary, (2, rows, length))
    documents = torch.zeros(rows, length, dtype=torch.int64)
    documents[:, length // 2 :] = 1
    positions = torch.arange(length).repeat(rows, 1)
    columns = {name: torch.rand(rows, length) for name in ("reference", "old", "advantages", "values", "returns")}
    columns["ends"] = torch.ones(rows, length)
    batch = Batch(tokens, labels, positions, documents, columns)
    for tensor in (tokens, labels, positions, documents, *columns.values()):
        typed.give(tensor, typed.whole(R, dp=V, ep=V))
    return batch
