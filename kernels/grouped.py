"""Products of groups of rows, each with a matrix of its own: the specification in plain PyTorch.

Tokens that chose the same expert are consecutive rows; there may be any number in a group, also none. `ends_G` says
where each group ends: group g is rows [ends_G[g - 1], ends_G[g]), and the last one ends with the rows. On a CPU every
group is one BLAS product straight into its rows of the result. The Triton forms with the same signatures are in
`grouped_triton.py`.

Shapes: N rows, G groups, I input and O output features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .accumulate import accumulate_product


def check(rows_N: Tensor, weight_GOI: Tensor, ends_G: Tensor, dim: int) -> None:
    """Raise ValueError for shapes that do not fit each other; all forms call it first. The rows are as wide as the
    weight is along `dim`."""
    if weight_GOI.dim() != 3 or ends_G.shape != weight_GOI.shape[:1] or ends_G.dtype != torch.int64:
        raise ValueError(
            f"weight must be [G, O, I] and ends int64 [G], not {tuple(weight_GOI.shape)} and {ends_G.dtype} "
            f"{tuple(ends_G.shape)}"
        )
    if rows_N.dim() != 2 or rows_N.shape[1] != weight_GOI.shape[dim]:
        raise ValueError(f"rows must be [N, {weight_GOI.shape[dim]}], not {tuple(rows_N.shape)}")


def groups(ends_G: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of every group that has any; waits for the numbers where they are on a GPU."""
    start = 0
    for group, end in enumerate(ends_G.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


def grouped_product(x_NI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """y_NO: each row times the transposed matrix of its group, in the dtype of the rows."""
    check(x_NI, weight_GOI, ends_G, 2)
    y_NO = x_NI.new_empty((x_NI.shape[0], weight_GOI.shape[1]))
    for group, rows in groups(ends_G):
        torch.mm(x_NI[rows], weight_GOI[group].t(), out=y_NO[rows])
    return y_NO


def grouped_input_gradient(grad_NO: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """grad_NI: each row of the output's gradient times the matrix of its group."""
    check(grad_NO, weight_GOI, ends_G, 1)
    grad_NI = grad_NO.new_empty((grad_NO.shape[0], weight_GOI.shape[2]))
    for group, rows in groups(ends_G):
        torch.mm(grad_NO[rows], weight_GOI[group], out=grad_NI[rows])
    return grad_NI


def grouped_weight_gradient_(total_GOI: Tensor, grad_NO: Tensor, x_NI: Tensor, ends_G: Tensor) -> Tensor:
    """Add grad^T @ x of each group's rows to its part of `total` (fp32); groups without rows are left as they are."""
    check(x_NI, total_GOI, ends_G, 2)
    check(grad_NO, total_GOI, ends_G, 1)
    for group, rows in groups(ends_G):
        accumulate_product(total_GOI[group], grad_NO[rows], x_NI[rows])
    return total_GOI
