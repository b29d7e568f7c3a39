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

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.kernels import Kernels
from megalite.parallel.products import PLAIN, Products, WideGradients
from megalite.placement import PlacedParameter

_NUMBERS, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8Weight(NamedTuple):
    """A weight as both products take it. Scales: numbers, of rows [O, 1] and [I, 1], or of blocks [o, i] and [i, o]."""

    codes_OI: Tensor
    scale: Tensor
    turned_IO: Tensor
    turned_scale: Tensor


class _Fp8Products(WideGradients, ABC):
    """Both GEMMs in FP8; inputs and results are bf16.

    A weight with a store (`PlacedParameter.store`) is cast once between two of its updates, and kept twice in 8 bits
    until then, under ZeRO-3 for as long as it is whole.
    """

    @abstractmethod
    def cast_weight(self, weight_OI: Tensor) -> Fp8Weight: ...

    @abstractmethod
    def multiply(
        self, a_NK: Tensor, dtype: torch.dtype, b_MK: Tensor, b_scale: Tensor, out_NM: Tensor | None, *, fast: bool
    ) -> Tensor:
        """a @ b^T, [N, M] in bf16, with `a` as `dtype`, `b_MK` in 8 bits already; `fast` accumulation may be used."""

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor | None = None) -> Tensor:
        weight = self._weight(weight_OI)
        y = self._product(x, _NUMBERS, weight.codes_OI, weight.scale, out, fast=True)
        return y if bias_O is None else torch.add(y, bias_O, out=out)

    def input_gradient(self, grad: Tensor, weight_OI: Tensor, out: Tensor | None = None) -> Tensor:
        weight = self._weight(weight_OI)
        return self._product(grad, _GRADIENTS, weight.turned_IO, weight.turned_scale, out, fast=False)

    def _weight(self, weight_OI: Tensor) -> Fp8Weight:
        def make() -> Fp8Weight:
            return self.cast_weight(weight_OI.detach())

        return weight_OI.derived(make) if isinstance(weight_OI, PlacedParameter) else make()

    def _product(
        self, a: Tensor, dtype: torch.dtype, b_MK: Tensor, b_scale: Tensor, out: Tensor | None, *, fast: bool
    ) -> Tensor:
        shape = (*a.shape[:-1], b_MK.shape[0])
        if not a.numel():
            return a.new_zeros(shape, dtype=torch.bfloat16)
        out_NM = None if out is None else out.flatten(0, -2)
        return self.multiply(a.flatten(0, -2), dtype, b_MK, b_scale, out_NM, fast=fast).view(shape)


@dataclass(frozen=True)
class Fp8Products(_Fp8Products):
    """Products by torch, with one scale for each operand or, `per_row`, for each of its rows."""

    per_row: bool
    kernels: Kernels

    def cast_weight(self, weight_OI: Tensor) -> Fp8Weight:
        return Fp8Weight(*self.kernels.fp8_cast_transpose(weight_OI, _NUMBERS, per_row=self.per_row))

    def multiply(
        self, a_NK: Tensor, dtype: torch.dtype, b_MK: Tensor, b_scale: Tensor, out_NM: Tensor | None, *, fast: bool
    ) -> Tensor:
        codes_NK, scale = self.kernels.fp8_cast(a_NK, dtype, per_row=self.per_row)
        return torch._scaled_mm(
            codes_NK,
            b_MK.t(),
            scale_a=scale,
            scale_b=b_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
            out=out_NM,
        )


@dataclass(frozen=True)
class Fp8BlockProducts(_Fp8Products):
    """Products with scales of blocks (`megalite.kernels.fp8_blocks`), which are always summed in fp32."""

    kernels: Kernels

    def cast_weight(self, weight_OI: Tensor) -> Fp8Weight:
        codes_OI, scale_oi, turned_IO = self.kernels.fp8_cast_weight_blocks(weight_OI, _NUMBERS)
        return Fp8Weight(codes_OI, scale_oi, turned_IO, scale_oi.t())

    def multiply(
        self, a_NK: Tensor, dtype: torch.dtype, b_MK: Tensor, b_scale: Tensor, out_NM: Tensor | None, *, fast: bool
    ) -> Tensor:
        codes_NK, scale_kN = self.kernels.fp8_cast_blocks(a_NK, dtype)
        product_NM: Tensor = self.kernels.fp8_block_product(codes_NK, scale_kN, b_MK, b_scale, out_NM)
        return product_NM


def products_of(fp8: str, kernels: Kernels) -> Products:
    """The products that `train.fp8` names: `none`, `tensor`, `row` or `block`."""
    if fp8 == "none":
        return PLAIN
    if fp8 == "block":
        return Fp8BlockProducts(kernels)
    return Fp8Products(fp8 == "row", kernels)
