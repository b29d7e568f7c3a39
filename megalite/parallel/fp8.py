"""Matrix products of linear layers in FP8.

N tokens, I / O input and output features (this rank's share), K whichever is summed over. FP8 GEMMs take both operands
as 8-bit floats with dynamic scales, one per tensor, per row or per block of 128: of activations and gradients computed
at every product, of weights once, since they change once a step. Activations and weights are e4m3, gradients e5m2
(wider range); sums are fp32, results bf16. Weight gradients stay in bf16 with fp32 accumulation, since training is most
sensitive to them. Embedding and output layer stay in the parameters' precision.

The forward product uses the tensor cores' fast accumulation (some 14 bits of mantissa between the products of 32
summands), which its operands' three bits hide; gradients are summed exactly. Processors ignore it.
Source: Micikevicius et al. 2022 (arXiv:2209.05433, sections 2 and 3); scaling at each product as in torch._scaled_mm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.kernels import Kernels
from megalite.parallel.products import PLAIN, Products, WideGradients
from megalite.placement import PlacedParameter

_NUMBERS, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Weight(NamedTuple):
    """A weight as both products take it, its scales numbers or one for each row: [O, 1] and [I, 1]."""

    codes_OI: Tensor
    scale: Tensor
    turned_IO: Tensor
    turned_scale: Tensor


@dataclass(frozen=True)
class Fp8Products(WideGradients):
    """Both GEMMs in FP8; inputs and results are bf16. `per_row`: one scale per row of either operand.

    `cast` and `cast_transpose` are the kernels, with the signatures of `megalite.kernels.fp8`. A weight with a store
    (`PlacedParameter.store`) is cast once between two of its updates, and kept twice in 8 bits until then, under ZeRO-3
    for as long as it is whole.
    """

    per_row: bool
    cast: Callable[..., tuple[Tensor, Tensor]]
    cast_transpose: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        weight = self._weight(weight_OI)
        y = self._product(x, _NUMBERS, weight.codes_OI, weight.scale, out, fast=True)
        return y if bias_O is None else torch.add(y, bias_O, out=out)

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        weight = self._weight(weight_OI)
        return self._product(grad, _GRADIENTS, weight.turned_IO, weight.turned_scale, out, fast=False)

    def _weight(self, weight_OI: Tensor) -> Fp8Weight:
        def make() -> Fp8Weight:
            return Fp8Weight(*self.cast_transpose(weight_OI.detach(), _NUMBERS, per_row=self.per_row))

        return weight_OI.derived(make) if isinstance(weight_OI, PlacedParameter) else make()

    def _product(
        self, a: Tensor, dtype: torch.dtype, b_MK: Tensor, b_scale: Tensor, out: Tensor | None, *, fast: bool
    ) -> Tensor:
        """a [..., K] @ b^T, with `a` as `dtype` and `b_MK` in 8 bits already."""
        if not a.numel():
            return a.new_zeros((*a.shape[:-1], b_MK.shape[0]), dtype=torch.bfloat16)
        a_NK, a_scale = self.cast(a.flatten(0, -2), dtype, per_row=self.per_row)
        product_NM = torch._scaled_mm(
            a_NK,
            b_MK.t(),
            scale_a=a_scale,
            scale_b=b_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
            out=None if out is None else out.flatten(0, -2),
        )
        return product_NM.view(*a.shape[:-1], b_MK.shape[0])


class Fp8BlockWeight(NamedTuple):
    """A weight as both products take it, with one scale for each 128 x 128 of it."""

    codes_OI: Tensor
    scale_oi: Tensor
    turned_IO: Tensor


@dataclass(frozen=True)
class Fp8BlockProducts(WideGradients):
    """The same with scales of blocks (`megalite.kernels.fp8_blocks`), whose products are summed in fp32."""

    kernels: Kernels

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        weight = self._weight(weight_OI)
        y = self._product(x, _NUMBERS, weight.codes_OI, weight.scale_oi, out)
        return y if bias_O is None else torch.add(y, bias_O, out=out)

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        weight = self._weight(weight_OI)
        return self._product(grad, _GRADIENTS, weight.turned_IO, weight.scale_oi.t(), out)

    def _weight(self, weight_OI: Tensor) -> Fp8BlockWeight:
        def make() -> Fp8BlockWeight:
            return Fp8BlockWeight(*self.kernels.fp8_cast_weight_blocks(weight_OI.detach(), _NUMBERS))

        return weight_OI.derived(make) if isinstance(weight_OI, PlacedParameter) else make()

    def _product(self, a: Tensor, dtype: torch.dtype, b_MK: Tensor, b_scale_mk: Tensor, out: Tensor | None) -> Tensor:
        """a [..., K] @ b^T, with `a` as `dtype` and `b_MK` in 8 bits already."""
        a_NK, a_scale_kN = self.kernels.fp8_cast_blocks(a.flatten(0, -2), dtype)
        out_NM = None if out is None else out.flatten(0, -2)
        product_NM: Tensor = self.kernels.fp8_block_product(a_NK, a_scale_kN, b_MK, b_scale_mk, out_NM)
        return product_NM.view(*a.shape[:-1], b_MK.shape[0])


def products_of(fp8: str, kernels: Kernels) -> Products:
    """The products that `train.fp8` names: `none`, `tensor`, `row` or `block`."""
    if fp8 == "none":
        return PLAIN
    if fp8 == "block":
        return Fp8BlockProducts(kernels)
    return Fp8Products(fp8 == "row", kernels.fp8_cast, kernels.fp8_cast_transpose)
