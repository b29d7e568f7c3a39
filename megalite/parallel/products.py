"""How linear layers multiply: the interface, and the products in the dtype of the tensors.

N tokens, I / O input and output features (this rank's share).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from megalite.kernels.accumulate import accumulate_product


class Products(Protocol):
    """How a linear layer multiplies."""

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        """x [..., I] -> x @ weight^T + bias [..., O], written to `out` (contiguous) if given."""
        ...

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        """grad [..., O] -> grad @ weight [..., I], written to `out` (contiguous) if given."""
        ...

    def weight_gradient_(self, total_OI: Tensor, grad_NO: Tensor, input_NI: Tensor, *, overwrite: bool = False) -> None:
        """total += grad^T @ input, accumulated in the dtype of `total` (fp32); or = where it is to `overwrite`."""
        ...

    def bias_gradient_(self, total_O: Tensor, grad_NO: Tensor) -> None:
        """total += the sum of grad over its rows."""
        ...


class WideGradients:
    """The gradients of weights and biases, of operands in their own dtype."""

    def weight_gradient_(self, total_OI: Tensor, grad_NO: Tensor, input_NI: Tensor, *, overwrite: bool = False) -> None:
        accumulate_product(total_OI, grad_NO, input_NI, overwrite=overwrite)

    def bias_gradient_(self, total_O: Tensor, grad_NO: Tensor) -> None:
        total_O.add_(grad_NO.sum(0))


class PlainProducts(WideGradients):
    """In the dtype of the tensors."""

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        if out is None:
            return functional.linear(x, weight_OI, bias_O)
        x_NI, out_NO = x.flatten(0, -2), out.flatten(0, -2)
        if bias_O is None:
            torch.mm(x_NI, weight_OI.t(), out=out_NO)
        else:
            torch.addmm(bias_O, x_NI, weight_OI.t(), out=out_NO)
        return out

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return grad @ weight_OI
        torch.mm(grad.flatten(0, -2), weight_OI, out=out.flatten(0, -2))
        return out


PLAIN: Products = PlainProducts()
