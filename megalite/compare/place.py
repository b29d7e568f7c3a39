"""Where the tensors of a module lie in the global batch: read from the placements of its parameters.

A module is called after the global tensors that it holds: `model.layers.3.self_attn`, as in a Hugging Face checkpoint.
An activation [rows, B, features] is put together from all micro-batches and ranks as [sequence, sample, features]: rows
follow from its length and the rank's place along `cp` and `tp`, samples from the micro-batch's number, features from
the boxes of a split weight.

S tokens of a sequence, s those of a tensor on this rank, B samples of a micro-batch, F features of a global tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.mesh import Mesh
from megalite.model.decoder import OUTPUT, Stage
from megalite.model.head import VocabParallelHead
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.context import ContextRegion
from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalite.placement import PlacedParameter, placed_parameters


@dataclass(frozen=True)
class Features:
    """Features [first, first + count) of the `total` of a named tensor, from `local` on in a rank's.

    `partial`: several ranks hold them, and the gradient of each is one term of a sum.
    """

    name: str
    total: int
    first: int
    count: int
    local: int = 0
    partial: bool = False


def module_names(stage: Stage) -> dict[str, str]:
    """Path of each module in the stage -> its global name; modules without parameters have none.

    A fused layer is called after all that it computes: `….self_attn.q_proj+k_proj+v_proj`.
    """
    names: dict[str, str] = {}
    for path, module in stage.named_modules():
        tensors = [box.name for parameter in placed_parameters(module) for box in parameter.placement.boxes]
        if not path or isinstance(module, nn.ModuleList):
            continue
        if isinstance(module, VocabParallelHead):  # a tied one holds the embedding's tensor
            names[path] = stage.build.prefix + OUTPUT.removesuffix(".weight")
        elif tensors:
            name = _common(tensors, fused=isinstance(module, ColumnParallelLinear))
            # What wraps one other module alone is called as that is.
            names[path] = f"{name}/{path.rpartition('.')[2]}" if name in names.values() else name
    return names


def _common(names: Sequence[str], *, fused: bool) -> str:
    """What the modules of these tensors have in common at the beginning of their names."""
    modules = [name.rpartition(".")[0].split(".") for name in names]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules))]
    name, rest = ".".join(shared), dict.fromkeys(".".join(parts[len(shared) :]) for parts in modules)
    return f"{name}.{'+'.join(rest)}" if fused and len(rest) > 1 else name


def output_features(module: nn.Module, name: str, width: int, hidden: int) -> Iterator[Features]:
    """The global tensors in the last dimension, `width` long, of a module's output; none where it cannot be told."""
    if isinstance(module, ColumnParallelLinear):
        for box in module.weight.placement.boxes:
            stem = box.name.removesuffix(".weight")
            yield Features(stem, box.shape[0], box.offset[0], box.size[0], box.local_offset[0], box.partial)
    elif width == hidden or _is_whole(module, width):
        yield Features(name, width, 0, width)


def input_features(module: nn.Module, name: str, width: int, hidden: int) -> Iterator[Features]:
    """The same of a module's input."""
    if isinstance(module, RowParallelLinear):
        for box in module.weight.placement.boxes:
            if box.size[1] == width:
                yield Features(name, box.shape[1], box.offset[1], box.size[1], box.local_offset[1])
    elif width == hidden or (isinstance(module, ColumnParallelLinear) and width == module.weight.shape[1]):
        yield Features(name, width, 0, width)


def _is_whole(module: nn.Module, width: int) -> bool:
    """Whether a module's own vector spans all features: a norm of something that is not split."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, PlacedParameter) and any(
        box.size == box.shape == (width,) for box in weight.placement.boxes
    )


@dataclass(frozen=True)
class TokenGrid:
    """Which tokens of a step's global batch this rank's tensors hold.

    `length` is S of the configuration, `size` B; the step has `samples` samples, the last micro-batch may have fewer.
    """

    mesh: Mesh
    context: ContextRegion
    region: TensorRegion
    length: int
    size: int
    samples: int

    def rows(self, count: int) -> Tensor | None:
        """The sequence's rows in a tensor of `count`; None where it is no tensor of tokens."""
        full = self.context.part_length(self.length)
        rows_s = self.context.rows(self.length) if self.context.size > 1 else torch.arange(full)
        if count == full:
            return rows_s.cpu()
        if count * self.context.split == full:
            return self.region.own(rows_s.cpu())
        return None

    def first_sample(self, micro: int) -> int:
        return (micro * self.mesh.samples_size + self.mesh.samples_index) * self.size

    def is_cut(self, count: int) -> bool:
        """Whether the tensor ranks hold different rows of it."""
        return self.mesh.tp > 1 and count != self.context.part_length(self.length)

    def boxes(self, values_sBF: Tensor, micro: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """((first row, first sample), values) for each run of rows that follow each other; padding is left out."""
        rows = self.rows(values_sBF.shape[0])
        assert rows is not None
        start = self.first_sample(micro)
        held = values_sBF[:, : max(0, min(self.size, self.samples - start))]
        if held.shape[1] == 0:
            return
        for first, stop in _runs(rows.tolist()):
            row, stop = int(rows[first]), min(stop, first + max(0, self.length - int(rows[first])))
            if first < stop:
                yield (row, start), held[first:stop]


def _runs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    """The ranges [first, stop) of places in which numbers count up by one."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield first, place
            first = place
