"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its rank-stabilised form (Kalajdzievski 2023, arXiv:2312.03732).

    y = W x + scale * B A x,    scale = alpha / r (`lora`) or alpha / sqrt(r) (`rslora`)

Only A and B are trained. Each keeps the kind of its layer: beside a column-parallel W, A is replicated and B is split
by its output features; beside a row-parallel W, A is split by its input features and B is replicated. So all that the
adapter sends is r wide: what A made is gathered where W's input is, and summed where W's output is.

S full sequence of the micro-batch, s its part outside tensor-parallel blocks, N micro-batch, I / O input and output
features of the whole layer, i / o this rank's share of them, r rank; R = r times the adapted matrices of a fused layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalite.config import AdapterConfig
from megalite.errors import UserError
from megalite.kernels.accumulate import accumulate_product
from megalite.model.build import Build, layer_name
from megalite.parallel.linear import (
    ColumnParallelLinear,
    Prologue,
    RowParallelLinear,
    add_weight_gradient,
    now_or_later,
    replay,
)
from megalite.parallel.overlap import GatheredGradient, gathered_output, summed_input_gradient, summed_output
from megalite.placement import Box, PlacedParameter, row_box

ROLE = "adapter"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def pair_names(name: str) -> tuple[str, str]:
    """The global names of A and B beside the weight `name`; PEFT's, without its prefix."""
    stem = name.removesuffix(".weight")
    return stem + DOWN, stem + UP


def adapted_layers(names: Iterable[str]) -> tuple[str, ...]:
    """The layers, as `adapter.targets` has them, that tensors of these names belong to; sorted."""
    return tuple(sorted({name.removesuffix(DOWN).split(".")[-1] for name in names if name.endswith(DOWN)}))


class LoRA:
    """Puts a pair of small matrices beside each linear layer that `adapter.targets` names."""

    def __init__(self, config: AdapterConfig) -> None:
        self.rank, self.scale, self.targets = config.rank, config.alpha / config.rank, config.targets

    def wants(self, name: str) -> bool:
        """Whether the weight with this global name gets an adapter."""
        return not self.targets or layer_name(name) in self.targets

    def column(self, build: Build, name: str, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> nn.Module:
        if not any(self.wants(box.name) for box in boxes):
            return layer
        return LoRAColumn(self, build, layer, boxes)

    def row(self, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> nn.Module:
        return LoRARow(self, build, name, layer, columns) if self.wants(name) else layer

    def require_fit(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise a `UserError` if the rank is greater than the weight's own can be."""
        if self.rank > min(shape):
            raise UserError(
                f"adapter.rank = {self.rank} exceeds the {min(shape)} features of {layer_name(name)} "
                f"{list(shape)}; use at most {min(shape)}, or leave it out of adapter.targets"
            )


class RankStabilisedLoRA(LoRA):
    """The same with scale alpha / sqrt(r), which keeps the size of updates as the rank grows."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        self.scale = config.alpha / math.sqrt(config.rank)


def down_std(inputs: int) -> float:
    """Standard deviation of A's initial values, which are uniform within 1 / sqrt(I), as PEFT draws them."""
    return 1 / math.sqrt(3 * inputs)


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapted matrix of a fused layer: its `outputs` in the layer's, its `rows` in B, its `columns` of what A
    made."""

    outputs: slice
    rows: slice
    columns: slice


def add_up(y: Tensor, u: Tensor, up: PlacedParameter, parts: Sequence[Part], scale: float) -> Tensor:
    """y_SNo += scale * u_SNR @ B^T, part by part, in place."""
    y_Mo, u_MR, up_or = y.flatten(0, -2), u.flatten(0, -2), up.gathered()
    for part in parts:
        y_Mo[:, part.outputs].addmm_(u_MR[:, part.columns], up_or[part.rows].t(), alpha=scale)
    return y


def up_input_gradient(grad_SNo: Tensor, up: PlacedParameter, parts: Sequence[Part], scale: float) -> Tensor:
    """The gradient of `add_up` for u [S, N, R]."""
    up_or = up.gathered()
    products = [grad_SNo[..., part.outputs] @ up_or[part.rows] for part in parts]
    return (products[0] if len(products) == 1 else torch.cat(products, -1)).mul_(scale)


def up_weight_gradient(
    up: PlacedParameter, grad_SNo: Tensor, u_SNR: Tensor, parts: Sequence[Part], scale: float
) -> Tensor | None:
    """Add the gradient of `add_up` for B to B's gradient buffer; without a buffer, return it for autograd."""
    buffer = up.grad_buffer()
    total = torch.zeros_like(up) if buffer is None else buffer
    grad_Mo, u_MR = grad_SNo.flatten(0, -2), u_SNR.flatten(0, -2).mul(scale)
    for part in parts:
        accumulate_product(total[part.rows], grad_Mo[:, part.outputs], u_MR[:, part.columns])
    if buffer is None:
        return total
    up.gradient_added()
    return None


class _Column(Function):
    """x_sNI -> y_SNo = W x + b + scale * B A x, W and b frozen. In backward the sum of the input's gradient over the
    ranks runs under the adapter's own products."""

    spmd = "x: V|I, down: R|I, up: V -> V"

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: PlacedParameter, up: PlacedParameter, module: LoRAColumn) -> Tensor:
        y_SNo, u_sNR = module.compute(x)
        ctx.save_for_backward(x, u_sNR)
        ctx.module = module
        return y_SNo

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, u_sNR), (grad_SNo,), module = ctx.saved_tensors, grads, ctx.module
        layer, down, up, parts, scale = module.layer, module.down, module.up, module.parts, module.scale
        region = layer.region
        u_SNR, gathered = region.gather_start(u_sNR)
        grad_u, summed_u = region.sum_start(up_input_gradient(grad_SNo, up, parts, scale))
        grad_x = summed = None
        if ctx.needs_input_grad[0]:
            grad_x, summed = summed_input_gradient(region, layer.products, grad_SNo, layer.weight.gathered())
        gathered.wait()
        grad_up = now_or_later(up, lambda: up_weight_gradient(up, grad_SNo, u_SNR, parts, scale))
        summed_u.wait()
        grad_down = now_or_later(down, lambda: add_weight_gradient(down, grad_u, x))
        if grad_x is not None and summed is not None:
            summed.wait()
            grad_x.flatten(0, -2).addmm_(grad_u.flatten(0, -2), down.gathered())
        return grad_x, grad_down, grad_up, None


class _Row(Function):
    """x_SNi = prologue(inputs) -> y_sNO = W x + scale * B A x, W frozen: W and A have their input in common, in
    forward, in backward, and where it is recomputed."""

    spmd = "down: V, up: R|I, inputs: V -> V|I"

    @staticmethod
    def forward(
        ctx: Any,
        down: PlacedParameter,
        up: PlacedParameter,
        module: LoRARow,
        prologue: Prologue | None,
        *inputs: Tensor,
    ) -> Tensor:
        y_sNO, u_sNr = module.compute(prologue(*inputs) if prologue else inputs[0])
        ctx.save_for_backward(u_sNr, *inputs)
        ctx.module, ctx.prologue = module, prologue
        return y_sNO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_sNO,), (u_sNr, *inputs), module = grads, ctx.saved_tensors, ctx.module
        layer, down, up, parts, scale = module.layer, module.down, module.up, module.parts, module.scale
        region = layer.region
        grad_SNr, gathered = region.gather_start(up_input_gradient(grad_sNO, up, parts, scale))
        grad_x = GatheredGradient(region, grad_sNO).input_gradient(layer.products, layer.weight.gathered())
        grad_up = now_or_later(up, lambda: up_weight_gradient(up, grad_sNO, u_sNr, parts, scale))
        gathered.wait()
        grad_x.flatten(0, -2).addmm_(grad_SNr.flatten(0, -2), down.gathered())
        x_SNi, grad_inputs = (inputs[0], (grad_x,)) if ctx.prologue is None else replay(ctx.prologue, inputs)(grad_x)
        grad_down = now_or_later(down, lambda: add_weight_gradient(down, grad_SNr, x_SNi))
        return grad_down, grad_up, None, None, *grad_inputs


class LoRAColumn(nn.Module):
    """Around a column-parallel layer: x [s, N, I] -> [S, N, o].

    The layer may be several global tensors in one (queries, keys and values). Each of them that is adapted has its own
    A and B in the checkpoint; here they lie in one matrix each, so that a fused layer has one product with A and one
    gather.
    """

    def __init__(self, lora: LoRA, build: Build, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> None:
        super().__init__()
        self.layer, self.scale = layer, lora.scale
        rank, inputs = lora.rank, boxes[0].shape[1]
        replicas = build.mesh.ranks_along("tp")
        partial = build.region.sequence and len(replicas) > 1  # each rank then has its own tokens
        self.parts: list[Part] = []
        down, up = [], []
        rows = 0
        for name, group in itertools.groupby(boxes, key=lambda box: box.name):
            mine = list(group)
            if not lora.wants(name):
                continue
            lora.require_fit(name, mine[0].shape)
            (down_name, up_name), first = pair_names(name), mine[0].local_offset[0]
            size, column = sum(box.size[0] for box in mine), len(self.parts) * rank
            down.append(row_box(down_name, (rank, inputs), 0, rank, column, replicas, partial=partial))
            up += [_narrowed(box, up_name, rank, rows + box.local_offset[0] - first) for box in mine]
            self.parts.append(Part(slice(first, first + size), slice(rows, rows + size), slice(column, column + rank)))
            rows += size
        width = rank * len(self.parts)
        self.down = build.parameter(
            down[0].name, (width, inputs), tuple(down), init="uniform", std=down_std(inputs), role=ROLE
        )
        self.up = build.parameter(up[0].name, (rows, rank), tuple(up), init="zeros", role=ROLE)

    def compute(self, x_sNI: Tensor) -> tuple[Tensor, Tensor]:
        """(the layer's output [S, N, o], what A made of this rank's tokens [s, N, R])."""
        layer = self.layer
        u_sNR = functional.linear(x_sNI, self.down.gathered())
        u_SNR, gathered = layer.region.gather_start(u_sNR)
        y_SNo, _ = gathered_output(layer.region, layer.products, x_sNI, layer.weight.gathered(), layer.bias)
        gathered.wait()
        return add_up(y_SNo, u_SNR, self.up, self.parts, self.scale), u_sNR

    def forward(self, x_sNI: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.compute(x_sNI)[0]
        return _Column.apply(x_sNI, self.down, self.up, self)


def _narrowed(box: Box, name: str, rank: int, row: int) -> Box:
    """The box of B that belongs to a box of W by rows, at `row` of the local B."""
    return dataclasses.replace(
        box, name=name, shape=(box.shape[0], rank), size=(box.size[0], rank), local_offset=(row, 0)
    )


class LoRARow(nn.Module):
    """Around a row-parallel layer: x [S, N, i] -> [s, N, O]."""

    def __init__(self, lora: LoRA, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.scale = layer, lora.scale
        (outputs, inputs), (start, length) = layer.weight.placement.boxes[0].shape, columns
        lora.require_fit(name, (outputs, inputs))
        down_name, up_name = pair_names(name)
        box = Box(down_name, (lora.rank, inputs), (0, start), (lora.rank, length), (0, 0), (build.mesh.rank,))
        self.down = build.parameter(
            down_name, (lora.rank, length), (box,), init="uniform", std=down_std(inputs), role=ROLE
        )
        self.up = build.replicated_parameter(up_name, (outputs, lora.rank), init="zeros", role=ROLE)
        self.parts = (Part(slice(0, outputs), slice(0, outputs), slice(0, lora.rank)),)

    def compute(self, x_SNi: Tensor) -> tuple[Tensor, Tensor]:
        """(the layer's output [s, N, O], what A made of them [s, N, r]), summed over the ranks."""
        layer = self.layer
        u_sNr, summed = layer.region.sum_start(functional.linear(x_SNi, self.down.gathered()))
        y_sNO = summed_output(layer.region, layer.products, x_SNi, layer.weight.gathered())
        summed.wait()
        return add_up(y_sNO, u_sNr, self.up, self.parts, self.scale), u_sNr

    def forward(self, *inputs: Tensor, prologue: Prologue | None = None) -> Tensor:
        """As `RowParallelLinear`."""
        if not torch.is_grad_enabled():
            return self.compute(prologue(*inputs) if prologue else inputs[0])[0]
        return _Row.apply(self.down, self.up, self, prologue, *inputs)
