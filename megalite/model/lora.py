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
from megalite.model.build import Build
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.linear import (
    PLAIN,
    ColumnParallelLinear,
    Products,
    Prologue,
    RowParallelLinear,
    accumulate_product,
    add_weight_gradient,
    now_or_later,
    replay,
)
from megalite.placement import Box, PlacedParameter, row_box

ROLE = "adapter"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def pair_names(name: str) -> tuple[str, str]:
    """The global names of A and B beside the weight `name`; PEFT's, without its prefix."""
    stem = name.removesuffix(".weight")
    return stem + DOWN, stem + UP


def layer_name(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`, as `adapter.targets` has it."""
    return name.split(".")[-2]


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


class _AddUp(Function):
    """y_SNo += scale * gather(u_sNR) @ B^T, part by part, in place; u is gathered along the sequence again in
    backward, under the product for its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        u: Tensor,
        weight: PlacedParameter,
        region: TensorRegion,
        parts: Sequence[Part],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(u)
        ctx.weight, ctx.region, ctx.parts, ctx.scale = weight, region, parts, scale
        ctx.mark_dirty(y)
        return add_up(y, u, weight, region, parts, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (u,), (grad_SNo,) = ctx.saved_tensors, grads
        weight, region = ctx.weight, ctx.region
        u_SNR, gathered = region.gather_start(u)
        products = [grad_SNo[..., part.outputs] @ weight.gathered()[part.rows] for part in ctx.parts]
        grad_u, summed = region.sum_start(torch.cat(products, -1).mul_(ctx.scale))
        gathered.wait()
        grad_weight = now_or_later(weight, lambda: _add_up_gradient(weight, grad_SNo, u_SNR, ctx.parts, ctx.scale))
        summed.wait()
        return grad_SNo, grad_u, grad_weight, None, None, None


def add_up(
    y: Tensor, u: Tensor, weight: PlacedParameter, region: TensorRegion, parts: Sequence[Part], scale: float
) -> Tensor:
    """y_SNo += scale * gather(u_sNR) @ B^T, in place."""
    u_MR, y_Mo, weight_or = region.gather(u).flatten(0, -2), y.flatten(0, -2), weight.gathered()
    for part in parts:
        y_Mo[:, part.outputs].addmm_(u_MR[:, part.columns], weight_or[part.rows].t(), alpha=scale)
    return y


def _add_up_gradient(
    weight: PlacedParameter, grad_SNo: Tensor, u_SNR: Tensor, parts: Sequence[Part], scale: float
) -> Tensor | None:
    """Add scale * grad^T @ u of each part to B's gradient buffer; without a buffer, return it for autograd."""
    buffer = weight.grad_buffer()
    total = torch.zeros_like(weight) if buffer is None else buffer
    grad_Mo, u_MR = grad_SNo.flatten(0, -2), u_SNR.flatten(0, -2).mul(scale)
    for part in parts:
        accumulate_product(total[part.rows], grad_Mo[:, part.outputs], u_MR[:, part.columns])
    if buffer is None:
        return total
    weight.gradient_added()
    return None


class _RowAndDown(Function):
    """prologue(inputs)_SNi -> (W x, A x), [s, N, O] and [s, N, r], W frozen: both products have their input in common,
    in forward, in backward, and where it is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: PlacedParameter,
        down: PlacedParameter,
        region: TensorRegion,
        products: Products,
        prologue: Prologue | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.weight, ctx.down, ctx.region, ctx.products, ctx.prologue = weight, down, region, products, prologue
        return row_and_down(weight, down, region, products, prologue, *inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_sNO, grad_sNr = grads
        inputs, region, down = ctx.saved_tensors, ctx.region, ctx.down
        grad_SNr, gathered = region.gather_start(grad_sNr)
        grad_x = ctx.products.input_gradient(region.gather(grad_sNO), ctx.weight.gathered())
        gathered.wait()
        grad_x.flatten(0, -2).addmm_(grad_SNr.flatten(0, -2), down.gathered())
        x_SNi = inputs[0]
        if ctx.prologue is not None:
            inputs, output = replay(ctx.prologue, inputs)
            x_SNi = output.detach()
        grad_down = now_or_later(down, lambda: add_weight_gradient(down, grad_SNr, x_SNi))
        grad_inputs = (grad_x,) if ctx.prologue is None else torch.autograd.grad(output, inputs, grad_x)
        return None, grad_down, None, None, None, *grad_inputs


def row_and_down(
    weight: PlacedParameter,
    down: PlacedParameter,
    region: TensorRegion,
    products: Products,
    prologue: Prologue | None,
    *inputs: Tensor,
) -> tuple[Tensor, Tensor]:
    """(W x, A x) of x = prologue(*inputs), summed over the ranks."""
    x_SNi = prologue(*inputs) if prologue else inputs[0]
    narrow, summed = region.sum_start(functional.linear(x_SNi, down.gathered()))
    wide = region.sum(products.output(x_SNi, weight.gathered(), None))
    summed.wait()
    return wide, narrow


class LoRAColumn(nn.Module):
    """Around a column-parallel layer: x [s, N, I] -> [S, N, o].

    The layer may be several global tensors in one (queries, keys and values). Each of them that is adapted has its own
    A and B in the checkpoint; here they lie in one matrix each, so that a fused layer has one product with A and one
    gather.
    """

    def __init__(self, lora: LoRA, build: Build, layer: ColumnParallelLinear, boxes: tuple[Box, ...]) -> None:
        super().__init__()
        self.layer, self.scale, self.region = layer, lora.scale, build.region
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
        weight = build.parameter(
            down[0].name, (width, inputs), tuple(down), init="uniform", std=down_std(inputs), role=ROLE
        )
        self.down = ColumnParallelLinear(weight, None, build.alone_region, PLAIN)
        self.up = build.parameter(up[0].name, (rows, rank), tuple(up), init="zeros", role=ROLE)

    def forward(self, x_sNI: Tensor) -> Tensor:
        y_SNo, u_sNR = self.layer(x_sNI), self.down(x_sNI)
        add = _AddUp.apply if torch.is_grad_enabled() else add_up
        return add(y_SNo, u_sNR, self.up, self.region, self.parts, self.scale)


def _narrowed(box: Box, name: str, rank: int, row: int) -> Box:
    """The box of B that belongs to a box of W by rows, at `row` of the local B."""
    return dataclasses.replace(
        box, name=name, shape=(box.shape[0], rank), size=(box.size[0], rank), local_offset=(row, 0)
    )


class LoRARow(nn.Module):
    """Around a row-parallel layer: x [S, N, i] -> [s, N, O]."""

    def __init__(self, lora: LoRA, build: Build, name: str, layer: RowParallelLinear, columns: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.scale, self.region = layer, lora.scale, build.alone_region
        (outputs, inputs), (start, length) = layer.weight.placement.boxes[0].shape, columns
        lora.require_fit(name, (outputs, inputs))
        down_name, up_name = pair_names(name)
        box = Box(down_name, (lora.rank, inputs), (0, start), (lora.rank, length), (0, 0), (build.mesh.rank,))
        self.down = build.parameter(
            down_name, (lora.rank, length), (box,), init="uniform", std=down_std(inputs), role=ROLE
        )
        self.up = build.replicated_parameter(up_name, (outputs, lora.rank), init="zeros", role=ROLE)
        self.parts = (Part(slice(0, outputs), slice(0, outputs), slice(0, lora.rank)),)

    def forward(self, *inputs: Tensor, prologue: Prologue | None = None) -> Tensor:
        """As `RowParallelLinear`."""
        layer, grad = self.layer, torch.is_grad_enabled()
        both, add = (_RowAndDown.apply, _AddUp.apply) if grad else (row_and_down, add_up)
        y_sNO, u_sNr = both(layer.weight, self.down, layer.region, layer.products, prologue, *inputs)
        return add(y_sNO, u_sNr, self.up, self.region, self.parts, self.scale)
