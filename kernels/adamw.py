"""AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2) over flat buffers, in PyTorch.

With t = step (from 1), g = grad_scale * grad:

    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

Every element is updated by itself, so a shard of the buffer gets the bits the whole would. The work goes by pieces that
stay in the processor's cache: about eight passes over memory become one. The Triton form is in `adamw_triton.py`.
"""

import math

import torch
from torch import Tensor

PIECE = 1 << 16  # elements: the five fp32 pieces of an update fill 1.3 MB


def check(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param_out: Tensor | None) -> None:
    """Raise ValueError if a buffer is not flat or not as long as `master`; both forms call it first."""
    buffers = {"master": master, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "param_out": param_out}
    for name, x in buffers.items():
        if x is not None:
            check_flat(name, x, master.numel())


def check_flat(name: str, x: Tensor, count: int) -> None:
    if x.dim() != 1 or not x.is_contiguous() or x.numel() != count:
        raise ValueError(f"{name} must be contiguous and 1-D with {count} elements, not {tuple(x.shape)}")


def adamw_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    param_out: Tensor | None = None,
) -> None:
    """Update `master` and both moments in place (fp32, 1-D contiguous, equal length), and write the new weights
    rounded to its dtype into `param_out` where one is given.

    grad: fp32 or bf16, read only; grad_scale: a number or a 0-d tensor on the same device (the clip coefficient, which
    then needs no synchronisation); step: 1 for the first update.
    """
    check(master, grad, exp_avg, exp_avg_sq, param_out)
    step_size = lr / (1 - beta1**step)
    root_correction = math.sqrt(1 - beta2**step)
    for start in range(0, master.numel(), PIECE):
        piece = slice(start, start + PIECE)
        w, m, v = master[piece], exp_avg[piece], exp_avg_sq[piece]
        g = grad[piece].to(w.dtype) * grad_scale
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_(root_correction).add_(eps)
        w.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-step_size)
        if param_out is not None:
            param_out[piece].copy_(w)


def square_sum(flat: Tensor) -> Tensor:
    """Sum of squares of a 1-D tensor of any float dtype, as a float64 scalar tensor on its device.

    Squares and sums are float64, so however the buffer is cut into shards the norm rounds to the same fp32 number.
    """
    check_flat("the buffer", flat, flat.numel())
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for piece in flat.split(PIECE):
        total += piece.double().square_().sum()
    return total
