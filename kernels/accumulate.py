"""total += a^T @ b with narrow factors and a wide sum: the weight gradient of every layer.

Shapes: N tokens, I / O input and output features.
"""

import torch
from torch import Tensor


def sums_in_the_product(device: torch.device) -> bool:
    """Whether products of bf16 or fp16 can be added to an fp32 total there (torch's `addmm` with `out_dtype`)."""
    return device.type != "cpu"


def accumulate_product(
    total_OI: Tensor, grad_NO: Tensor, input_NI: Tensor, *, block_bytes: int | None = None, overwrite: bool = False
) -> None:
    """total_OI += grad_NO^T @ input_NI, in the dtype of `total_OI` (fp32) whatever the factors' dtype; with
    `overwrite`, which takes no `block_bytes`, the product alone, whatever was there.

    On a GPU one product adds bf16 or fp16 factors to an fp32 total: nothing is rounded on the way, and there is no pass
    over memory besides. CPUs have no such product. There it is rounded to the factors' dtype and then added, whole or,
    with `block_bytes`, for as many rows of the total at a time as fit into that. All may be strided.
    """
    if overwrite:
        _write_product(total_OI, grad_NO.t(), input_NI)
    elif grad_NO.dtype == total_OI.dtype:
        total_OI.addmm_(grad_NO.t(), input_NI)
    elif sums_in_the_product(total_OI.device):
        torch.addmm(total_OI, grad_NO.t(), input_NI, out_dtype=total_OI.dtype, out=total_OI)
    elif block_bytes is None:
        total_OI.add_(grad_NO.t() @ input_NI)
    else:
        step = max(1, block_bytes // (grad_NO.element_size() * max(total_OI.shape[1], 1)))
        for start in range(0, total_OI.shape[0], step):
            rows = slice(start, start + step)
            total_OI[rows] += grad_NO[:, rows].t() @ input_NI


def _write_product(out_OI: Tensor, grad_ON: Tensor, input_NI: Tensor) -> None:
    if grad_ON.dtype == out_OI.dtype:
        torch.mm(grad_ON, input_NI, out=out_OI)
    elif sums_in_the_product(out_OI.device):
        torch.mm(grad_ON, input_NI, out_dtype=out_OI.dtype, out=out_OI)
    else:
        out_OI.copy_(grad_ON @ input_NI)
