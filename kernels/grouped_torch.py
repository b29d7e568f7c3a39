"""Grouped products by `torch.nn.functional.grouped_mm`: CUTLASS on a GPU. Specification: `grouped.py`.

A candidate beside `grouped_triton.py`. Which of the two is faster depends on the GPU and on the rows of an expert;
`python benchmarks/kernels.py --only grouped` measures both.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from .grouped import check

_ALIGNED = 16
"""Bytes: a row of either factor has to begin at such an address."""


def unsupported(rows: Tensor, other: Tensor, *rest: Tensor) -> str | None:
    """Why torch's operator does not take these arguments, or None. The weight gradient's fp32 sum may be any."""
    factors = (rows, other) if rows.dim() == 2 else (other, *rest[:1])
    if len({x.dtype for x in factors}) > 1:
        return "factors of different dtypes"
    if rows.is_cuda and (torch.cuda.get_device_capability(rows.device) < (8, 0) or factors[0].dtype != torch.bfloat16):
        return f"{factors[0].dtype} on {torch.cuda.get_device_name(rows.device)}; it takes bfloat16 from sm_80 on"
    if any(x.shape[-1] * x.element_size() % _ALIGNED for x in (rows, other, *rest[:1]) if x.dim() > 1):
        return f"rows that are no multiple of {_ALIGNED} bytes"
    return None


def grouped_product(x_NI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped.grouped_product`."""
    check(x_NI, weight_GOI, ends_G, 2)
    if not len(x_NI):
        return x_NI.new_empty((0, weight_GOI.shape[1]))
    return grouped_mm(x_NI.contiguous(), weight_GOI.transpose(1, 2), offs=ends_G.to(torch.int32))


def grouped_input_gradient(grad_NO: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped.grouped_input_gradient`."""
    check(grad_NO, weight_GOI, ends_G, 1)
    if not len(grad_NO):
        return grad_NO.new_empty((0, weight_GOI.shape[2]))
    return grouped_mm(grad_NO.contiguous(), weight_GOI, offs=ends_G.to(torch.int32))


def grouped_weight_gradient_(total_GOI: Tensor, grad_NO: Tensor, x_NI: Tensor, ends_G: Tensor) -> Tensor:
    """As `grouped.grouped_weight_gradient_`, but each product is rounded to the rows' dtype before it is added: the
    operator writes no other, and a pass over the sum comes on top."""
    check(x_NI, total_GOI, ends_G, 2)
    check(grad_NO, total_GOI, ends_G, 1)
    if len(x_NI):
        total_GOI += grouped_mm(grad_NO.contiguous().t(), x_NI.contiguous(), offs=ends_G.to(torch.int32))
    return total_GOI
