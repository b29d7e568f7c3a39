"""Products that are symmetric, alpha A A^T + beta D: the specification in plain PyTorch.

Muon's Newton-Schulz iterations make two of them from every matrix. Half of the result is the mirror image of the other
half; the Triton form in `symmetric_triton.py` computes one of them.

Shapes: R rows, C columns.
"""

import torch
from torch import Tensor


def check(a_RC: Tensor, addend_RR: Tensor | None) -> None:
    """Raise ValueError for shapes that do not fit each other; all forms call it first."""
    if a_RC.dim() != 2:
        raise ValueError(f"the matrix must have two dimensions, not {tuple(a_RC.shape)}")
    rows = a_RC.shape[0]
    if addend_RR is not None and addend_RR.shape != (rows, rows):
        raise ValueError(f"the addend must be [{rows}, {rows}], not {tuple(addend_RR.shape)}")


def symmetric_product(
    a_RC: Tensor, addend_RR: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """[R, R]: alpha A A^T + beta D, in the dtype of A. The addend D must be symmetric."""
    check(a_RC, addend_RR)
    if addend_RR is None:
        product = a_RC @ a_RC.mT
        return product if alpha == 1.0 else product.mul_(alpha)
    return torch.addmm(addend_RR, a_RC, a_RC.mT, beta=beta, alpha=alpha)
