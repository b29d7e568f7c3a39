"""The build context passed to every layer's constructor, with factories for linear layers, norms and embeddings.

A layer requests its parts by global name; how they are split over the tensor ranks, in which precision they multiply,
and whether an adapter wraps them is decided here, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from megalite.config import AdapterConfig, ModelConfig
from megalite.kernels import Kernels
from megalite.mesh import DATA_AXES, Mesh
from megalite.model.head import ScalarHead, VocabParallelHead
from megalite.model.norm import RMSNorm
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.embedding import VocabParallelEmbedding, vocabulary_box
from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalite.parallel.products import PLAIN, Products
from megalite.placement import Box, PlacedParameter, Placement, row_box
from megalite.registry import look_up

STD = 0.02
"""Standard deviation of initial weights."""


class Adapter(Protocol):
    """A wrapper around linear layers; the parameters it creates have the role `adapter`."""

    def column(self, build: Build, name: str, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> nn.Module:
        """The replacement for a column-parallel layer, with the same call signature; `boxes` as in `Build.column`."""
        ...

    def row(self, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> nn.Module:
        """The replacement for a row-parallel layer, with the same call signature; `columns` as in `Build.row`."""
        ...


def make_adapter(config: AdapterConfig) -> Adapter | None:
    """The adapter of `adapter.kind`, its targets unchecked; None for `none`."""
    if config.kind == "none":
        return None
    make: Callable[[AdapterConfig], Adapter] = look_up("adapter.kind", config.kind)
    return make(config)


def layer_name(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`, as `adapter.targets` has it."""
    return name.split(".")[-2]


@dataclass(frozen=True)
class Build:
    """How the layers of one pipeline stage are built.

    `prefix` is prepended to every global name (`critic.` for a second model in the same checkpoint). With `shared`,
    parameters are taken from there instead of being created: a second view of the same weights, such as for generation
    without sequence parallelism. `parameters` collects all parameters by name; `adapter` wraps every linear layer.
    """

    model: ModelConfig
    mesh: Mesh
    region: TensorRegion
    kernels: Kernels
    dtype: torch.dtype = torch.float32
    products: Products = PLAIN
    prefix: str = ""
    adapter: Adapter | None = None
    shared: Mapping[str, PlacedParameter] | None = None
    parameters: dict[str, PlacedParameter] = field(default_factory=dict)

    make_head: ClassVar[type[VocabParallelHead]] = VocabParallelHead

    @property
    def residual_std(self) -> float:
        """For projections into the residual stream, so that its scale does not grow with depth (GPT-2)."""
        return STD / math.sqrt(2 * self.model.layers)

    @property
    def norm_init(self) -> str:
        """What weights of norms begin as."""
        return "zeros" if self.model.zero_centered_norm else "ones"

    def parameter(
        self,
        key: str,
        shape: tuple[int, ...],
        boxes: tuple[Box, ...],
        *,
        init: str = "normal",
        std: float = STD,
        role: str = "matrix",
        reduce: tuple[str, ...] = DATA_AXES,
        dtype: torch.dtype | None = None,
    ) -> PlacedParameter:
        """An uninitialised parameter of local `shape` that holds `boxes`; `key` is unique in the stage."""
        if self.shared is not None:
            self.parameters[key] = self.shared[key]
        else:
            boxes = tuple(dataclasses.replace(box, name=self.prefix + box.name) for box in boxes)
            data = torch.empty(shape, dtype=dtype or self.dtype, device=self.mesh.device)
            self.parameters[key] = PlacedParameter(data, Placement(boxes, init, std, reduce, role))
        return self.parameters[key]

    def column(self, boxes: tuple[Box, ...], bias_boxes: tuple[Box, ...] = ()) -> nn.Module:
        """A linear layer whose output is split: `boxes` are the rows of global weights that this rank holds, in the
        order of its fused weight [o, I]; `bias_boxes` the same for the bias [o]."""
        features = sum(box.size[0] for box in boxes)
        weight = self.parameter(boxes[0].name, (features, boxes[0].shape[1]), boxes)
        bias = None
        if bias_boxes:
            bias = self.parameter(bias_boxes[0].name, (features,), bias_boxes, init="zeros", role="vector")
        layer = ColumnParallelLinear(weight, bias, self.region, self.products)
        return layer if self.adapter is None else self.adapter.column(self, boxes[0].name, layer, boxes)

    def row(self, name: str, features: tuple[int, int], columns: tuple[int, int]) -> nn.Module:
        """A linear layer whose input is split: this rank holds (first, count) `columns` of the global weight
        `features` = (O, I)."""
        (outputs, _), (start, length) = features, columns
        box = Box(name, features, (0, start), (outputs, length), (0, 0), (self.mesh.rank,))
        weight = self.parameter(name, (outputs, length), (box,), std=self.residual_std)
        layer = RowParallelLinear(weight, self.region, self.products)
        return layer if self.adapter is None else self.adapter.row(self, name, layer, columns)

    def replicated_parameter(
        self, name: str, shape: tuple[int, ...], *, partial: bool | None = None, **options: Any
    ) -> PlacedParameter:
        """A parameter that all tensor ranks hold whole; `options` as of `parameter`. `partial`: each rank uses it for
        different tokens or heads, so its gradient is one term of a sum; by default so under sequence parallelism."""
        return self.parameter(name, shape, (self._replicated_box(name, shape, partial),), **options)

    def _replicated_box(self, name: str, shape: tuple[int, ...], partial: bool | None = None) -> Box:
        replicas = self.mesh.ranks_along("tp")
        summed = (self.region.sequence if partial is None else partial) and len(replicas) > 1
        return row_box(name, shape, 0, shape[0], 0, replicas, partial=summed)

    def state(self, name: str, shape: tuple[int, ...], *, init: str) -> PlacedParameter:
        """fp32 numbers that are saved with the weights and that no gradient trains, the same on all ranks: what has
        been learnt about the load of experts."""
        parameter = self.replicated_parameter(name, shape, partial=False, init=init, role="vector", dtype=torch.float32)
        parameter.requires_grad_(False)
        return parameter

    @property
    def alone_region(self) -> TensorRegion:
        """For what every tensor rank does by itself."""
        return TensorRegion(self.mesh.alone, False)

    def replicated(
        self, name: str, features: tuple[int, int], *, init: str = "normal", std: float = STD, role: str = "matrix"
    ) -> nn.Module:
        """A linear layer that all tensor ranks hold whole, `features` = (O, I), for activations as they are between
        the tensor-parallel blocks: [s, B, I] -> [s, B, O]. Not quantised."""
        weight = self.replicated_parameter(name, features, init=init, std=std, role=role)
        layer = ColumnParallelLinear(weight, None, self.alone_region, PLAIN)
        if self.adapter is None:
            return layer
        return self.adapter.column(self, name, layer, (self._replicated_box(name, features),))

    def norm(self, name: str, size: int, *, partial: bool | None = None, eps: float | None = None) -> RMSNorm:
        """A norm whose weight is replicated over the tensor ranks; `partial` as of `replicated_parameter`, `eps` by
        default `model.norm_eps`."""
        weight = self.replicated_parameter(name, (size,), partial=partial, init=self.norm_init, role="vector")
        eps = self.model.norm_eps if eps is None else eps
        return RMSNorm(weight, eps, self.kernels, self.model.zero_centered_norm)

    def embedding(self, name: str, replicas: tuple[int, ...]) -> VocabParallelEmbedding:
        """The token embedding; `replicas` are the ranks that hold the same rows (a tied output layer elsewhere)."""
        weight, first, _ = self.vocabulary(name, replicas, role="embedding")
        return VocabParallelEmbedding(weight, first, self.region)

    def head(
        self, name: str, replicas: tuple[int, ...], *, z_loss: float, tied_to: PlacedParameter | None
    ) -> VocabParallelHead:
        """The output layer; `replicas` as of `embedding`.

        `tied_to` is the embedding's weight if both are in this process: the storage is shared, while the gradients are
        kept apart and added once a step, as they are when the two are on different pipeline stages.
        """
        weight, first, valid = self.vocabulary(name, replicas, role="output")
        if tied_to is not None and weight.tied_to is None:
            weight.data, weight.tied_to = tied_to.data, tied_to
            weight.requires_grad_(tied_to.requires_grad)
        return self.make_head(weight, first, valid, self.region, self.kernels, self.model, z_loss=z_loss)

    def scalar_head(self, name: str) -> ScalarHead:
        """One value per position."""
        return ScalarHead(self.replicated_parameter(name, (1, self.model.hidden_size), role="output"), self.region)

    def vocabulary(self, name: str, replicas: tuple[int, ...], *, role: str) -> tuple[PlacedParameter, int, int]:
        """(weight [v, H] with padding, its first row, its true rows) of a vocabulary split over the tensor ranks."""
        hidden = self.model.hidden_size
        rows, first, boxes = vocabulary_box(name, self.model.vocab_size, hidden, self.region, replicas)
        weight = self.parameter(f"{role}: {name}", (rows, hidden), boxes, role=role)
        return weight, first, sum(box.size[0] for box in boxes)
