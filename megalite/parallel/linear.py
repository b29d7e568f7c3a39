"""Tensor-parallel linear layers, written by hand.

Shapes: S full sequence of the micro-batch, s = S / tp under sequence parallelism, else S, B micro-batch, I / O input
and output features of the whole layer, i / o this rank's share of them.

Sequence parallelism saves memory here: a column-parallel layer saves its input split along the sequence and gathers it
again in backward, overlapped with the input-gradient GEMM; the reduction of that gradient then overlaps with the
weight-gradient GEMM. `parallel.keep_gathered` saves the gathered input instead. Weight gradients are accumulated
straight into the parameter's fp32 `main_grad`.

Where the region has pieces (`parallel.tensor_overlap_splits`), every collective runs beside some product:

    forward          in pieces under the layer's own product (`megalite.parallel.overlap`)
    column backward  input gathered under the layers after it (`gather_ahead`) or its own input gradient, which is
                     summed in pieces under that product and the weight gradient of the row-parallel layer after it
    row backward     gradient gathered in pieces under what is recomputed, the weight gradient of the column-parallel
                     layer after it (`megalite.parallel.deferred`), and its own input gradient

`spmd` of an autograd function are the types of what it takes and gives along its axis (docs/numerics.md, "Types").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from megalite.mesh import DONE
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.overlap import GatheredGradient, gathered_output, summed_input_gradient, summed_output
from megalite.parallel.products import PLAIN, Products
from megalite.placement import PlacedParameter

Prologue = Callable[..., Tensor]


@dataclass(frozen=True)
class FusedPrologue:
    """A prologue of which backward needs result and gradients, and makes them in one pass over memory.

    `again(grad, *inputs)` gives (the result, a tuple with the gradient of each input).
    """

    forward: Prologue
    again: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.forward(*inputs)


def add_weight_gradient(
    weight: PlacedParameter, grad_output: Tensor, inputs: Tensor, products: Products = PLAIN
) -> Tensor | None:
    """Add grad_output^T @ inputs to the weight's gradient buffer; without a buffer, return it for autograd."""
    grad_NO, input_NI = grad_output.flatten(0, -2), inputs.flatten(0, -2)
    total, stale = weight.grad_target()
    if total is None:
        return grad_NO.t() @ input_NI
    products.weight_gradient_(total, grad_NO, input_NI, overwrite=stale)
    weight.gradient_added()
    return None


def now_or_later(weight: PlacedParameter, add: Callable[[], Tensor | None]) -> Tensor | None:
    """Call `add`, which adds the weight's gradient, now, or when the schedule asks for it; its result, if now."""
    if not weight.requires_grad:
        return None
    if weight.delay is None:
        return add()
    weight.delay(add)
    return None


def _beside_the_next(weight: PlacedParameter, region: TensorRegion, add: Callable[[], Tensor | None]) -> Tensor | None:
    """Call `add`, which adds the weight's gradient, now, or beside the next collective of a region with pieces."""
    if region.pieces == 1 or not weight.has_grad_buffer:  # what autograd adds up itself, it wants now
        return add()
    region.deferred.put(add)
    return None


def replay(prologue: Prologue, inputs: Iterable[Tensor]) -> Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]:
    """Backward of what was not saved: what can be recomputed is now, before the gradient of the result is known.

    Returns a function of that gradient: (`prologue` of `inputs`, the gradient of each input).
    """
    if isinstance(prologue, FusedPrologue):
        return lambda grad: prologue.again(grad, *inputs)
    with torch.enable_grad():
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        output = prologue(*inputs)
    return lambda grad: (output.detach(), torch.autograd.grad(output, inputs, grad))


def add_bias_gradient(bias: PlacedParameter | None, grad_output: Tensor, products: Products = PLAIN) -> Tensor | None:
    """The same for a bias: the sum of `grad_output` over all but the last dimension."""
    if bias is None or not bias.requires_grad:
        return None
    grad_NO = grad_output.flatten(0, -2)
    total = bias.grad_buffer()
    if total is None:
        return grad_NO.sum(0)
    products.bias_gradient_(total, grad_NO)
    bias.gradient_added()
    return None


class _ColumnLinear(Function):
    """x_sBI -> y_SBo: gather along the sequence, multiply by this rank's rows of the weight."""

    spmd = "x: V|I, weight: V, bias: V -> V"

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: PlacedParameter,
        bias: PlacedParameter | None,
        region: TensorRegion,
        products: Products,
    ) -> Any:
        y_SBo, x_SBI = gathered_output(region, products, x, weight.gathered(), bias)
        kept = x_SBI if region.keeps else x
        ctx.save_for_backward(*((kept,) if weight.requires_grad else ()))  # for the weight's gradient alone
        ctx.weight, ctx.bias, ctx.region, ctx.products = weight, bias, region, products
        ctx.gathering = None
        return y_SBo

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_SBo,), weight, region = grads, ctx.weight, ctx.region
        products: Products = ctx.products
        _start_gathering(ctx)
        grad_x, summed = None, DONE
        if ctx.needs_input_grad[0]:
            grad_x, summed = summed_input_gradient(region, products, grad_SBo, weight.gathered())
        region.deferred.run()
        grad_weight = None
        if ctx.gathering is not None:
            (x_SBI, gathered), ctx.gathering = ctx.gathering, None

            def add() -> Tensor | None:
                gathered.wait()
                return add_weight_gradient(weight, grad_SBo, x_SBI, products)

            grad_weight = _beside_the_next(weight, region, add)
        elif weight.requires_grad:  # put off: what is gathered again stays split along the sequence until then
            (x,) = ctx.saved_tensors
            weight.delay(lambda: add_weight_gradient(weight, grad_SBo, _whole(region, x), products))
        grad_bias = add_bias_gradient(ctx.bias, grad_SBo, products)
        summed.wait()
        return grad_x, grad_weight, grad_bias, None, None


def _start_gathering(node: Any) -> None:
    """Start to gather the saved input of a `_ColumnLinear`, if its backward pass is going to need the whole."""
    if node.gathering is None and node.weight.requires_grad and node.weight.delay is None:
        (x,) = node.saved_tensors
        node.gathering = (x, DONE) if node.region.keeps else node.region.gather_start(x)


def _whole(region: TensorRegion, x: Tensor) -> Tensor:
    """The whole input [S, B, I] of a `_ColumnLinear`, out of what it saved."""
    return x if region.keeps else region.gather(x)


class _GatherAhead(Function):
    """x as it is. In backward, the gather of what the weight gradient of a column-parallel layer needs is started."""

    spmd = "x: V -> V"

    @staticmethod
    def forward(ctx: Any, x: Tensor, node: Any) -> Tensor:
        ctx.node = node
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _start_gathering(ctx.node)
        return grads[0], None


def gather_ahead(x: Tensor, column: Tensor) -> Tensor:
    """`x`, made of the output `column` of a column-parallel layer. In backward, the layer's input is gathered under all
    that lies between the two. Only where the layer's region has pieces; one with an adapter gathers something else."""
    node = column.grad_fn
    if not isinstance(node, BackwardCFunction) or not hasattr(node, "gathering") or node.region.pieces == 1:
        return x
    ahead: Tensor = _GatherAhead.apply(x, node)
    return ahead


class _RowLinear(Function):
    """prologue(inputs)_SBi -> y_sBO: multiply by this rank's columns of the weight, sum over the ranks.

    With a `prologue`, only its inputs are saved and it is evaluated again in backward: cheap element-wise work (SwiGLU)
    is recomputed instead of stored.
    """

    spmd = "weight: V, inputs: V -> V|I"

    @staticmethod
    def forward(
        ctx: Any,
        weight: PlacedParameter,
        region: TensorRegion,
        products: Products,
        prologue: Prologue | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*(inputs if weight.requires_grad or prologue is not None else ()))
        ctx.weight, ctx.region, ctx.products, ctx.prologue = weight, region, products, prologue
        x_SBi = prologue(*inputs) if prologue else inputs[0]
        return summed_output(region, products, x_SBi, weight.gathered())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_sBO,), inputs, weight, region = grads, ctx.saved_tensors, ctx.weight, ctx.region
        products: Products = ctx.products
        gathered = GatheredGradient(region, grad_sBO)
        replayed = replay(ctx.prologue, inputs) if ctx.prologue else None
        region.deferred.run()
        grad_x = gathered.input_gradient(products, weight.gathered())
        grad_inputs: tuple[Tensor, ...] = (grad_x,)
        if replayed:
            x_SBi, grad_inputs = replayed(grad_x)
        elif weight.requires_grad:
            (x_SBi,) = inputs
        grad_weight, grad_SBO = None, gathered.whole_SBO
        if weight.requires_grad:
            if weight.delay is not None:
                weight.delay(lambda: add_weight_gradient(weight, region.gather(grad_sBO), x_SBi, products))
            else:
                grad_weight = _beside_the_next(
                    weight, region, lambda: add_weight_gradient(weight, grad_SBO, x_SBi, products)
                )
        return grad_weight, None, None, None, *grad_inputs


class _Entered(Function):
    """x [s, ...] -> [S, ...]; the ranks' gradients are summed."""

    spmd = "x: V|I -> R"

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: TensorRegion) -> Tensor:
        ctx.region = region
        return region.gather(x) if region.split > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.region.sum(grads[0].clone()), None


def enter_region(x: Tensor, region: TensorRegion) -> Tensor:
    """Activations [s, ...] that every tensor rank computed alike, for use by each with its own heads: [S, ...]."""
    return x if region.size == 1 else _Entered.apply(x, region)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W (output features) split over the tensor ranks.

    Input [s, B, I]; output [S, B, o], left split. Made by `megalite.model.build.Build.column`.
    """

    def __init__(
        self, weight: PlacedParameter, bias: PlacedParameter | None, region: TensorRegion, products: Products
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.region, self.products = weight, bias, region, products

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a token's time in generation is mostly what autograd would add to it
            return gathered_output(self.region, self.products, x, self.weight.gathered(), self.bias)[0]
        return _ColumnLinear.apply(x, self.weight, self.bias, self.region, self.products)


class RowParallelLinear(nn.Module):
    """y = x W^T with the columns of W (input features) split over the tensor ranks.

    Input [S, B, i], split; output [s, B, O], summed over the ranks. Made by `megalite.model.build.Build.row`.
    """

    def __init__(self, weight: PlacedParameter, region: TensorRegion, products: Products) -> None:
        super().__init__()
        self.weight, self.region, self.products = weight, region, products

    def forward(self, *inputs: Tensor, prologue: Prologue | None = None) -> Tensor:
        """The layer's input [S, B, i] is `inputs[0]`, or `prologue(*inputs)`, which is then recomputed in backward."""
        if not torch.is_grad_enabled():
            x_SBi = prologue(*inputs) if prologue else inputs[0]
            return summed_output(self.region, self.products, x_SBi, self.weight.gathered())
        return _RowLinear.apply(self.weight, self.region, self.products, prologue, *inputs)
