"""Tensor-parallel linear layers and the vocabulary-parallel embedding, written by hand.

Shapes: S sequence (of the micro-batch, whole), s = S / tp where sequence parallel and S where not, B micro-batch,
I / O input and output features of the whole layer, i / o this rank's share of them, V padded vocabulary, v = V / tp.

Sequence parallelism here saves memory: a column-parallel layer keeps its input cut by sequence and gathers it again in
backward, under the product that gives the input's gradient; the sum of that gradient over the ranks then runs under
the product that gives the weight's. Weight gradients are added straight into the fp32 `main_grad` of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from megalite.mesh import DONE
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.fp8 import PLAIN, Products
from megalite.placement import Box, PlacedParameter, Placement, row_box

Prologue = Callable[..., Tensor]


def accumulate_product(total: Tensor, grad_NO: Tensor, input_NI: Tensor) -> None:
    """total_OI += grad_NO^T @ input_NI, in the dtype of `total` (fp32) whatever that of the factors."""
    if grad_NO.dtype == total.dtype:
        total.addmm_(grad_NO.t(), input_NI)
    else:
        total.add_(grad_NO.t() @ input_NI)


def add_weight_gradient(weight: PlacedParameter, grad_output: Tensor, inputs: Tensor) -> Tensor | None:
    """Accumulate grad_output^T @ inputs into `weight.main_grad`, or return it for autograd while there is none."""
    grad_NO, input_NI = grad_output.flatten(0, -2), inputs.flatten(0, -2)
    if weight.main_grad is None:
        return grad_NO.t() @ input_NI
    accumulate_product(weight.main_grad, grad_NO, input_NI)
    weight.gradient_accumulated()
    return None


def add_bias_gradient(bias: PlacedParameter | None, grad_output: Tensor) -> Tensor | None:
    """The same for a bias: the sum of `grad_output` over all but the last dimension."""
    if bias is None:
        return None
    grad = grad_output.flatten(0, -2).sum(0)
    if bias.main_grad is None:
        return grad
    bias.main_grad.add_(grad)
    bias.gradient_accumulated()
    return None


class _ColumnLinear(Function):
    """x_sBI -> y_SBo: gather along the sequence, multiply by this rank's rows of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: PlacedParameter,
        bias: PlacedParameter | None,
        region: TensorRegion,
        products: Products,
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.region, ctx.products = weight, bias, region, products
        return products.output(region.gather(x), weight.ready, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (grad_SBo,) = ctx.saved_tensors, grads
        weight, region = ctx.weight, ctx.region
        postponed = weight.postpone is not None
        x_SBI, gathered = (x, DONE) if postponed else region.gather_start(x)
        product = ctx.products.input_gradient(grad_SBo, weight.ready) if ctx.needs_input_grad[0] else None
        grad_x, summed = (None, DONE) if product is None else region.sum_start(product)
        gathered.wait()
        grad_weight = None
        if postponed:  # what is kept until then stays cut by sequence
            weight.postpone(lambda: add_weight_gradient(weight, grad_SBo, region.gather(x)))
        else:
            grad_weight = add_weight_gradient(weight, grad_SBo, x_SBI)
        grad_bias = add_bias_gradient(ctx.bias, grad_SBo)
        summed.wait()
        return grad_x, grad_weight, grad_bias, None, None


class _RowLinear(Function):
    """prologue(inputs)_SBi -> y_sBO: multiply by this rank's columns of the weight, sum over the ranks.

    With a `prologue`, only its inputs are kept, and it is evaluated again in backward: this is how cheap element-wise
    work (SwiGLU) is recomputed instead of stored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: PlacedParameter,
        region: TensorRegion,
        products: Products,
        prologue: Prologue | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.weight, ctx.region, ctx.products, ctx.prologue = weight, region, products, prologue
        x_SBi = prologue(*inputs) if prologue else inputs[0]
        return region.sum(products.output(x_SBi, weight.ready, None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_sBO,), inputs, weight, region = grads, ctx.saved_tensors, ctx.weight, ctx.region
        grad_SBO = region.gather(grad_sBO)
        grad_x = ctx.products.input_gradient(grad_SBO, weight.ready)
        x_SBi = inputs[0]
        if ctx.prologue is not None:
            with torch.enable_grad():
                inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
                output = ctx.prologue(*inputs)
            x_SBi = output.detach()
        grad_weight = None
        if weight.postpone is not None:
            weight.postpone(lambda: add_weight_gradient(weight, region.gather(grad_sBO), x_SBi))
        else:
            grad_weight = add_weight_gradient(weight, grad_SBO, x_SBi)
        grad_inputs = (grad_x,) if ctx.prologue is None else torch.autograd.grad(output, inputs, grad_x)
        return grad_weight, None, None, None, *grad_inputs


class _Embed(Function):
    """ids_SB -> hidden_sBH. Each rank looks up the ids that it holds, zeros elsewhere, and the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, weight: PlacedParameter, ids_SB: Tensor, first: int, region: TensorRegion) -> Tensor:
        local_SB = ids_SB - first
        present_SB = (local_SB >= 0) & (local_SB < weight.shape[0])
        ctx.weight, ctx.region = weight, region
        ctx.save_for_backward(local_SB, present_SB)
        if region.group.size == 1:
            return functional.embedding(local_SB, weight.ready)
        partial_SBH = functional.embedding(local_SB.where(present_SB, 0), weight.ready)
        return region.sum(partial_SBH.mul_(present_SB.unsqueeze(-1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        local_SB, present_SB = ctx.saved_tensors
        weight, region = ctx.weight, ctx.region
        grad_NH, ids_N = region.gather(grads[0]).flatten(0, 1), local_SB.flatten()
        if region.group.size > 1:
            held_N = present_SB.flatten().nonzero().squeeze(1)
            grad_NH, ids_N = grad_NH[held_N], ids_N[held_N]
        if weight.main_grad is None:
            return torch.zeros_like(weight).index_add_(0, ids_N, grad_NH), None, None, None
        weight.main_grad.index_add_(0, ids_N, grad_NH.to(weight.main_grad.dtype))
        weight.gradient_accumulated()
        return None, None, None, None


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W (output features) split over the tensor ranks.

    Input [s, B, I]; output [S, B, o], left split. `boxes` say which rows of which global tensors the local weight
    [o, I] holds; `bias_boxes` the same for the local bias [o].
    """

    def __init__(
        self, in_features: int, boxes: tuple[Box, ...], bias_boxes: tuple[Box, ...], region: TensorRegion, **kwargs: Any
    ) -> None:
        super().__init__()
        out_features = sum(box.size[0] for box in boxes)
        self.region = region
        self.products: Products = PLAIN
        self.weight = PlacedParameter(torch.empty(out_features, in_features, **kwargs), Placement(boxes))
        self.bias = None
        if bias_boxes:
            self.bias = PlacedParameter(torch.empty(out_features, **kwargs), Placement(bias_boxes, init="zeros"))

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.region, self.products)


class RowParallelLinear(nn.Module):
    """y = x W^T with the columns of W (input features) split over the tensor ranks.

    Input [S, B, i], split; output [s, B, O], summed over the ranks. `std` is that of the initial weights.
    """

    def __init__(
        self,
        name: str,
        features: tuple[int, int],
        columns: tuple[int, int],
        rank: int,
        region: TensorRegion,
        std: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        out_features, in_features = features
        start, length = columns
        box = Box(name, (out_features, in_features), (0, start), (out_features, length), (0, 0), (rank,))
        self.region = region
        self.products: Products = PLAIN
        self.weight = PlacedParameter(torch.empty(out_features, length, **kwargs), Placement((box,), std=std))

    def forward(self, *inputs: Tensor, prologue: Prologue | None = None) -> Tensor:
        """The layer's input [S, B, i] is `inputs[0]`, or `prologue(*inputs)`, which is then recomputed in backward."""
        return _RowLinear.apply(self.weight, self.region, self.products, prologue, *inputs)


def vocabulary_box(
    name: str, vocab_size: int, hidden_size: int, region: TensorRegion, replicas: tuple[int, ...], *, partial: bool
) -> tuple[int, int, tuple[Box, ...]]:
    """(rows per rank with padding, first row, boxes) of a vocabulary-parallel weight.

    The vocabulary is padded to a multiple of the tensor ranks; the last ranks may hold fewer true rows, or none.
    """
    rows = -(-vocab_size // region.group.size)
    first = region.group.index * rows
    true_rows = max(0, min(vocab_size - first, rows))
    shape = (vocab_size, hidden_size)
    boxes = (row_box(name, shape, first, true_rows, 0, replicas, partial=partial),) if true_rows else ()
    return rows, first, boxes


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the rows split over the tensor ranks: ids [B, S] (int64) -> hidden [s, B, H]."""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        replicas: tuple[int, ...],
        region: TensorRegion,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        rows, self.first, boxes = vocabulary_box(
            name, vocab_size, hidden_size, region, replicas, partial=len(replicas) > 1
        )
        self.region = region
        self.weight = PlacedParameter(torch.empty(rows, hidden_size, **kwargs), Placement(boxes))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return _Embed.apply(self.weight, tokens_BS.t(), self.first, self.region)
