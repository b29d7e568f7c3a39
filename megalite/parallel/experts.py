"""Expert layers' communication and products, written by hand: rows sorted by expert, sent to its rank, and back.

A token of a sparse layer becomes K rows, one for each expert it chose. Rows are sorted by expert; the ranks along `ep`
hold consecutive experts, so that rows for one rank are consecutive, too. Every rank takes part in every exchange, even
if it sends or gets nothing, and exactly the rows there are travel.

Shapes: S, B, H as everywhere, s this rank's part of the sequence; K experts of a token, N = S B K rows in the order of
the tokens or sorted; M rows that arrived here, O / I features of an expert, E all experts, e those of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megalite.kernels import Kernels
from megalite.mesh import DONE, Group, Work
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.linear import Prologue, now_or_later, replay
from megalite.placement import PlacedParameter


@dataclass(frozen=True)
class Sorting:
    """An order of rows: sorted row i was row `order_N[i]` before, and row j is sorted row `inverse_N[j]`."""

    order_N: Tensor
    inverse_N: Tensor

    @staticmethod
    def of(keys_N: Tensor) -> Sorting:
        """By ascending key; equal ones keep their order."""
        order_N = torch.argsort(keys_N, stable=True)
        numbers = torch.arange(order_N.numel(), device=order_N.device)
        return Sorting(order_N, torch.empty_like(order_N).scatter_(0, order_N, numbers))


def _gathered_rows(sorting: Sorting, rows: Tensor, copies: int) -> Tensor:
    """Sorted rows out of unsorted ones that count `copies` times each."""
    return rows[sorting.order_N // copies if copies > 1 else sorting.order_N]


def _summed_rows(sorting: Sorting, rows: Tensor, copies: int) -> Tensor:
    """The reverse: the sum of each row's copies, in a fixed order."""
    rows = rows[sorting.inverse_N]
    return rows.view(-1, copies, rows.shape[1]).sum(1) if copies > 1 else rows


class _Spread(Function):
    """x [s, ..., width] -> sorted rows [N, width]: gathered over the tensor ranks, each row repeated `copies` times."""

    spmd = "x: V|I -> R"

    @staticmethod
    def forward(ctx: Any, x: Tensor, sorting: Sorting, copies: int, region: TensorRegion) -> Tensor:
        ctx.sorting, ctx.copies, ctx.region = sorting, copies, region
        whole = region.gather(x)
        ctx.shape = whole.shape
        return _gathered_rows(sorting, whole.reshape(-1, whole.shape[-1]), copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        summed = _summed_rows(ctx.sorting, grads[0], ctx.copies).view(ctx.shape)
        return ctx.region.sum(summed), None, None, None


class _Collect(Function):
    """Sorted rows [N, width] -> [s, ...]: each token's `copies` rows summed, and the sums summed over tensor ranks."""

    spmd = "rows: P -> V|I"

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sorting: Sorting, copies: int, region: TensorRegion, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.sorting, ctx.copies, ctx.region = sorting, copies, region
        return region.sum(_summed_rows(sorting, rows, copies).view(shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole = ctx.region.gather(grads[0])
        width = whole.shape[-1]
        return _gathered_rows(ctx.sorting, whole.reshape(-1, width), ctx.copies), None, None, None, None


def spread(x: Tensor, sorting: Sorting, copies: int, region: TensorRegion) -> Tensor:
    """Tokens, each `copies` times, as sorted rows; x [s, ..., width] -> [N, width]."""
    return _Spread.apply(x, sorting, copies, region)


def collect(rows: Tensor, sorting: Sorting, copies: int, region: TensorRegion, shape: tuple[int, ...]) -> Tensor:
    """Sorted rows [N, H] summed for each token: [s, B, H]; `shape` is (S, B, H)."""
    return _Collect.apply(rows, sorting, copies, region, shape)


class Exchange:
    """One all-to-all of rows; its gradient travels back the same way. `leaving` and `arriving` are rows for each rank.

    Between `start` and `finish` other work can be done, and in backward again: the gradients set out where `finish`
    was called and are waited for where `start` was.
    """

    def __init__(self, group: Group, leaving: list[int], arriving: list[int]) -> None:
        self.group, self.leaving, self.arriving = group, leaving, arriving
        self.work: Work = DONE
        self.gradient: Tensor | None = None

    def wait(self) -> None:
        """For what is under way. The work is let go: it holds the buffer, whose graph holds this exchange."""
        self.work.wait()
        self.work = DONE

    def start(self, rows: Tensor) -> Tensor:
        """The buffer of the rows that will arrive; only `finish` may read it."""
        return _Start.apply(rows, self)

    def finish(self, buffer: Tensor) -> Tensor:
        return _Finish.apply(buffer, self)


class _Start(Function):
    spmd = "rows: V -> V"

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        buffer = rows.new_empty((sum(exchange.arriving), *rows.shape[1:]))
        exchange.work = exchange.group.all_to_all(buffer, rows.contiguous(), exchange.arriving, exchange.leaving)
        return buffer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        exchange = ctx.exchange
        exchange.wait()
        gradient, exchange.gradient = exchange.gradient, None
        return gradient, None


class _Finish(Function):
    spmd = "buffer: V -> V"

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), exchange = grads, ctx.exchange
        exchange.gradient = grad.new_empty((sum(exchange.leaving), *grad.shape[1:]))
        exchange.work = exchange.group.all_to_all(
            exchange.gradient, grad.contiguous(), exchange.leaving, exchange.arriving
        )
        return grad, None  # to `_Start`, which returns what has arrived until then instead


def exchange_counts(counts_E: Tensor, group: Group) -> tuple[Tensor, list[int], list[int]]:
    """(rows that come from each rank for each expert here [ranks, e], rows that leave for, and come from, each rank).

    counts_E are this rank's rows for each expert. The lists are needed on the host: a GPU is waited for once.
    """
    arriving_RE = torch.empty_like(counts_E)
    each = [counts_E.numel() // group.size] * group.size
    group.all_to_all(arriving_RE, counts_E, each, each).wait()
    sums = torch.stack([counts_E.view(group.size, -1).sum(1), arriving_RE.view(group.size, -1).sum(1)])
    leaving, arriving = sums.tolist()
    return arriving_RE.view(group.size, -1), leaving, arriving


class _GroupedLinear(Function):
    """prologue(inputs)_MI -> y_MO: each row times the matrix of its expert; the weight is [e O, I], one below another.

    As in `linear._RowLinear`, only the inputs of a `prologue` are saved, and it is evaluated again in backward.
    """

    spmd = "local"

    @staticmethod
    def forward(
        ctx: Any,
        weight: PlacedParameter,
        ends_G: Tensor,
        kernels: Kernels,
        prologue: Prologue | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.weight, ctx.ends_G, ctx.kernels, ctx.prologue = weight, ends_G, kernels, prologue
        x_MI = prologue(*inputs) if prologue else inputs[0]
        return kernels.grouped_product(x_MI, _by_expert(weight.gathered(), ends_G), ends_G)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs, weight, ends_G, kernels = ctx.saved_tensors, ctx.weight, ctx.ends_G, ctx.kernels
        grad_MO = grads[0].contiguous()
        grad_MI = kernels.grouped_input_gradient(grad_MO, _by_expert(weight.gathered(), ends_G), ends_G)
        x_MI, grad_inputs = (inputs[0], (grad_MI,)) if ctx.prologue is None else replay(ctx.prologue, inputs)(grad_MI)
        grad_weight = now_or_later(weight, lambda: _add_gradient(weight, ends_G, kernels, grad_MO, x_MI))
        return grad_weight, None, None, None, *grad_inputs


def _by_expert(weight: Tensor, ends_G: Tensor) -> Tensor:
    """[e O, I] -> [e, O, I]"""
    return weight.view(ends_G.numel(), -1, weight.shape[1])


def _add_gradient(
    weight: PlacedParameter, ends_G: Tensor, kernels: Kernels, grad_MO: Tensor, x_MI: Tensor
) -> Tensor | None:
    """Add the weight's gradient to its buffer, also where no row came: the bucket waits for every parameter. Without a
    buffer, return it for autograd."""
    buffer = weight.grad_buffer()
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if buffer is None else buffer
    kernels.grouped_weight_gradient_(_by_expert(total, ends_G), grad_MO, x_MI, ends_G)
    if buffer is None:
        return total.to(weight.dtype)
    weight.gradient_added()
    return None


class GroupedLinear(nn.Module):
    """y = x W^T with a matrix for each expert of this rank, of which every row uses one.

    `weight` is [experts * O, I]. `rows`: the input features are split over the tensor ranks, not the output's.
    """

    def __init__(self, weight: PlacedParameter, kernels: Kernels, *, rows: bool) -> None:
        super().__init__()
        self.weight, self.kernels, self.rows = weight, kernels, rows

    def forward(self, ends_G: Tensor, *inputs: Tensor, prologue: Prologue | None = None) -> Tensor:
        """Rows [M, I], sorted by expert, are `inputs[0]`, or `prologue(*inputs)`, which is then recomputed in backward;
        `ends_G` as in `megalite.kernels.grouped`."""
        return _GroupedLinear.apply(self.weight, ends_G, self.kernels, prologue, *inputs)
