"""Sums and products whose bits do not depend on the number of ranks (`train.invariant`, docs/invariance.md).

The work is cut into a fixed number of virtual parts, a power of two, however many ranks there are. A rank computes its
parts one after the other, each from tensors of the same shapes on any number of ranks and in memory of its own, since
a matrix product may choose its order of summation by shape and alignment. Sums over parts go up one binary tree:
neighbours are added, then neighbouring sums, and so on. A rank holds 2^k neighbouring parts, whose sum is a node of
the tree, and the ranks' sums go up the rest of it.

N tokens of a micro-batch, I / O input and output features of a layer on this rank. S sequence, B micro-batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from megalite.kernels import Kernels
from megalite.mesh import Group, GroupFactory, Work, create_group
from megalite.parallel.buckets import Bucket
from megalite.parallel.zero import StageBuckets


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape up the binary tree; with an odd number of terms the last one waits a level."""
    level = list(terms)
    while len(level) > 1:
        pairs = [left + right for left, right in zip(level[::2], level[1::2])]
        level = pairs + level[len(level) // 2 * 2 :]
    return level[0]


class TreeGroup(Group):
    """A group whose sums go up the tree in the order of the ranks.

    An all-reduce gathers every rank's tensor, and moves size - 1 times its bytes; a reduce-scatter moves as many bytes
    as an ordinary one.
    """

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        if self.size == 1 or op != "sum":
            return super().all_reduce(tensor, op)
        terms = tensor.new_empty((self.size, tensor.numel()))
        work = self.all_gather(terms.view(-1), tensor.reshape(-1))
        return _Then(work, lambda: tensor.copy_(tree_sum(terms.unbind()).view(tensor.shape)))

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Work:
        if self.size == 1:
            return super().reduce_scatter(output, tensor)
        terms, each = torch.empty_like(tensor), [tensor.shape[0] // self.size] * self.size
        work = self.all_to_all(terms, tensor, each, each)
        return _Then(work, lambda: output.copy_(tree_sum(terms.view(self.size, *output.shape).unbind())))


@dataclass
class _Then:
    """A communication and what is computed from its result once it has arrived."""

    work: Work
    finish: Callable[[], object]

    def wait(self) -> None:
        self.work.wait()
        self.finish()


def tree_groups(make: GroupFactory = create_group) -> GroupFactory:
    """A `Mesh.make_group` of tree groups over the process groups that `make` creates."""

    def make_tree(ranks: tuple[int, ...], rank: int) -> Group:
        return TreeGroup(ranks, rank, make(ranks, rank).handle)

    return make_tree


# Linear layers

Ranges = tuple[tuple[int, int], ...]
"""(start, length) of a part's rows or columns of a local weight: one range for each tensor that is fused in it."""


def ranges_of_parts(sizes: Sequence[int], parts: int) -> tuple[Ranges, ...]:
    """For each of `parts` parts its ranges, where tensors of `sizes` lie one after the other and each is cut evenly."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        tuple((start + part * size // parts, size // parts) for start, size in zip(starts, sizes))
        for part in range(parts)
    )


def _take(tensor: Tensor, ranges: Ranges, dim: int) -> Tensor:
    """The ranges of `tensor` one after the other, as a new contiguous tensor."""
    return torch.cat([tensor.narrow(dim, start, length) for start, length in ranges], dim)


def _put(part: Tensor, into: Tensor, ranges: Ranges, dim: int, *, add: bool = False) -> None:
    """Write (or add) what `_take` would take."""
    for (start, length), piece in zip(ranges, part.split([length for _, length in ranges], dim)):
        place = into.narrow(dim, start, length)
        place.add_(piece) if add else place.copy_(piece)


@dataclass(frozen=True)
class ColumnParts:
    """The products of a layer whose output features are cut; see `megalite.parallel.products.Products`."""

    parts: tuple[Ranges, ...]

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        x_NI = x.flatten(0, -2).contiguous()
        out_NO = x_NI.new_empty((len(x_NI), len(weight_OI)))
        for ranges in self.parts:
            bias = None if bias_O is None else _take(bias_O, ranges, 0)
            _put(functional.linear(x_NI, _take(weight_OI, ranges, 0), bias), out_NO, ranges, 1)
        return out_NO.view(*x.shape[:-1], -1)

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        grad_NO = grad.flatten(0, -2)
        terms = [_take(grad_NO, ranges, 1) @ _take(weight_OI, ranges, 0) for ranges in self.parts]
        return tree_sum(terms).view(*grad.shape[:-1], -1)

    def weight_gradient_(self, total_OI: Tensor, grad_NO: Tensor, input_NI: Tensor, *, overwrite: bool = False) -> None:
        input_NI = input_NI.contiguous()
        for ranges in self.parts:
            _put(_take(grad_NO, ranges, 1).t() @ input_NI, total_OI, ranges, 0, add=not overwrite)

    def bias_gradient_(self, total_O: Tensor, grad_NO: Tensor) -> None:
        for ranges in self.parts:
            _put(_take(grad_NO, ranges, 1).sum(0), total_O, ranges, 0, add=True)


@dataclass(frozen=True)
class RowParts:
    """The products of a layer whose input features are cut; it has no bias."""

    parts: tuple[Ranges, ...]

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        x_NI = x.flatten(0, -2)
        terms = [functional.linear(_take(x_NI, ranges, 1), _take(weight_OI, ranges, 1)) for ranges in self.parts]
        return tree_sum(terms).view(*x.shape[:-1], -1)

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        grad_NO = grad.flatten(0, -2).contiguous()
        out_NI = grad_NO.new_empty((len(grad_NO), weight_OI.shape[1]))
        for ranges in self.parts:
            _put(grad_NO @ _take(weight_OI, ranges, 1), out_NI, ranges, 1)
        return out_NI.view(*grad.shape[:-1], -1)

    def weight_gradient_(self, total_OI: Tensor, grad_NO: Tensor, input_NI: Tensor, *, overwrite: bool = False) -> None:
        grad_NO = grad_NO.contiguous()
        for ranges in self.parts:
            _put(grad_NO.t() @ _take(input_NI, ranges, 1), total_OI, ranges, 1, add=not overwrite)

    def bias_gradient_(self, total_O: Tensor, grad_NO: Tensor) -> None:
        raise AssertionError("a row-parallel layer has no bias")


# Other operations


def kernels_of_parts(kernels: Kernels, parts: int) -> Kernels:
    """The kernels, with those that mix the columns or the heads of a rank called for each part by itself.

    Attention may choose its form and its blocks by the number of heads, and a gated activation rounds the last columns
    of a row, which do not fill a register, in its own way.
    """

    def attention(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Tensor:
        cut = zip(*(tensor.chunk(parts, 2) for tensor in (q_SBHD, k_SBKD, v_SBKD)))
        return torch.cat([kernels.attention(*map(Tensor.contiguous, part), **options) for part in cut], 2)

    def gated(activation: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
        if parts == 1:
            return activation(gate_up)
        cut = zip(*(half.chunk(parts, -1) for half in gate_up.chunk(2, -1)))
        return torch.cat([activation(torch.cat(part, -1)) for part in cut], -1)

    def again(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if parts == 1:
            return kernels.swiglu_again(grad, gate_up)  # type: ignore[no-any-return]
        cut = zip(*(half.chunk(parts, -1) for half in (grad, *gate_up.chunk(2, -1))))
        made = [kernels.swiglu_again(part.contiguous(), torch.cat(pair, -1)) for part, *pair in cut]
        halves = zip(*(gradient.chunk(2, -1) for _, gradient in made))
        return torch.cat([y for y, _ in made], -1), torch.cat([part for half in halves for part in half], -1)

    return dataclasses.replace(
        kernels,
        attention=attention,
        swiglu=functools.partial(gated, kernels.swiglu),
        swiglu_again=again,
        geglu=functools.partial(gated, kernels.geglu),
    )


class _Shared(Function):
    """A weight that all parts of all tensor ranks use -> one view for each part of this rank.

    In backward the parts' gradients are summed up the tree, so every rank gets the whole gradient.
    """

    spmd = "weight: I -> R"

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: int, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(weight.clone() for _ in range(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = tree_sum(grads).contiguous()
        ctx.group.all_reduce(total).wait()
        return total, None, None


def shared_by_parts(weight: Tensor, parts: int, group: Group) -> tuple[Tensor, ...]:
    """`weight`, once for each of this rank's parts; its gradient is the sum over the parts of all ranks of `group`."""
    copies: tuple[Tensor, ...] = _Shared.apply(weight, parts, group)
    return copies


# Gradients


class PartBuckets(StageBuckets):
    """The buckets of a stage that goes through the parts of a batch one after the other, a pipeline run for each.

    The parts' gradients go up the tree like the carries of a binary counter, so that a rank with 2^k parts keeps at
    most k gradients besides the one that is accumulated. They are reduced over the ranks after the last part.
    """

    def begin_step(self, parts: int) -> None:
        """Announce a step of so many parts; `begin` and `finish` are then called once for each."""
        self._parts, self._done = parts, 0
        self._sums: dict[int, list[Tensor]] = {id(bucket): [] for bucket in self.trained}

    def _complete(self, bucket: Bucket) -> None:
        """Nothing is reduced before the last part has been added."""

    def finish(self) -> None:
        self._done += 1
        for bucket in self.trained:
            bucket.complete_gradients()
            assert bucket.gradients is not None
            sums, number = self._sums[id(bucket)], self._done
            while number % 2 == 0:
                bucket.gradients.add_(sums.pop())  # of two terms, the order does not matter
                number //= 2
            if self._done < self._parts:
                sums.append(bucket.gradients.clone())
        if self._done == self._parts:
            super().finish()
