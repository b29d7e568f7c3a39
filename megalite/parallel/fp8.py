"""Matrix products of linear layers in FP8.

N tokens, I / O input and output features (this rank's share). FP8 GEMMs take both operands as 8-bit floats with dynamic
scales, one per tensor or one per row, computed at every product. Activations and weights are e4m3, gradients e5m2
(wider range); sums are fp32, results bf16. Weight gradients stay in bf16 with fp32 accumulation, since training is most
sensitive to them. Embedding and output layer stay in the parameters' precision.
Source: Micikevicius et al. 2022 (arXiv:2209.05433, sections 2 and 3); scaling at each product as in torch._scaled_mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.parallel.linear import PLAIN, Products, WideGradients

_TINY = 1e-12


@dataclass(frozen=True)
class Fp8Products(WideGradients):
    """Both GEMMs in FP8; inputs and results are bf16. `per_row`: one scale per row of either operand."""

    per_row: bool

    def output(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        y = self._product(x, weight_OI, torch.float8_e4m3fn)
        return y if bias_O is None else y + bias_O

    def input_gradient(self, grad: Tensor, weight_OI: Tensor) -> Tensor:
        return self._product(grad, weight_OI.t(), torch.float8_e5m2)

    def _product(self, a: Tensor, b_MK: Tensor, dtype: torch.dtype) -> Tensor:
        """a [..., K] @ b^T, with `a` as `dtype`."""
        a_NK = a.flatten(0, -2)
        left_NK, left_scale_N1 = self._quantise(a_NK, dtype)
        right_MK, right_scale_M1 = self._quantise(b_MK, torch.float8_e4m3fn)
        product_NM = torch._scaled_mm(
            left_NK,
            right_MK.t(),
            scale_a=left_scale_N1,
            scale_b=right_scale_M1.t() if self.per_row else right_scale_M1,
            out_dtype=torch.bfloat16,
        )
        return product_NM.view(*a.shape[:-1], b_MK.shape[0])

    def _quantise(self, x_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(x / scale as `dtype`, row-major; scale, fp32); the largest magnitude maps to the maximum of `dtype`."""
        size = x_NK.abs().amax(dim=1, keepdim=True) if self.per_row else x_NK.abs().amax()
        limit = torch.finfo(dtype).max
        scale = size.float().clamp(min=_TINY) / limit
        return (x_NK.float() / scale).clamp(-limit, limit).to(dtype).contiguous(), scale


def products_of(fp8: str) -> Products:
    """The products that `train.fp8` names: `none`, `tensor` or `row`."""
    return PLAIN if fp8 == "none" else Fp8Products(per_row=fp8 == "row")
