"""AdamW over flat buffers in Triton, one launch, and the sum of squares for the gradient's norm. Formula: `adamw.py`.

Bound by memory: 28 bytes an element (w, m, v read and written, g read, fp32), 2 less for a bf16 gradient, 2 more where
the bf16 parameter is written in the same pass. The sum of squares reads the buffer once; every program adds up its
share in float64 and writes one number, and the shares are added in a fixed order: no atomics, the same bits every
time.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw import check, check_flat
from .layout import obstacle, program_count

BLOCK = 1024


@triton.jit
def adamw_kernel(
    master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, param_ptr, scale_ptr, count,
    lr_decay, step_size, beta1, beta2, rest1, rest2, root_correction, eps, HAS_PARAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    w = tl.load(master_ptr + at, mask=mask, other=0.0)
    m = beta1 * tl.load(exp_avg_ptr + at, mask=mask, other=0.0) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0) + rest2 * g * g
    w = w * lr_decay - step_size * (m / (tl.sqrt(v) / root_correction + eps))
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)
    tl.store(master_ptr + at, w, mask=mask)
    if HAS_PARAM:
        tl.store(param_ptr + at, w.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit
def square_sum_kernel(flat_ptr, shares_ptr, count, BLOCK: tl.constexpr):
    share = tl.zeros([BLOCK], dtype=tl.float64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    for _ in range(tl.cdiv(count - first, tl.num_programs(0) * BLOCK)):
        x = tl.load(flat_ptr + at, mask=at < count, other=0.0).to(tl.float64)
        share += x * x
        at += tl.num_programs(0) * BLOCK
    tl.store(shares_ptr + tl.program_id(0), tl.sum(share, axis=0))


@torch.library.custom_op("megalite::adamw_", mutates_args={"master", "exp_avg", "exp_avg_sq", "param_out"})
def _adamw_(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param_out: Tensor | None, grad_scale: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    count = master.numel()
    if count:
        adamw_kernel[(triton.cdiv(count, BLOCK),)](
            master, grad, exp_avg, exp_avg_sq, master if param_out is None else param_out, grad_scale, count,
            1 - lr * weight_decay, lr / (1 - beta1**step), beta1, beta2, 1 - beta1, 1 - beta2,
            math.sqrt(1 - beta2**step), eps, HAS_PARAM=param_out is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("megalite::square_sum", mutates_args=())
def _square_sum(flat: Tensor) -> Tensor:
    programs = max(1, min(4 * program_count(flat.device), triton.cdiv(flat.numel(), BLOCK)))
    shares = torch.empty(programs, dtype=torch.float64, device=flat.device)
    square_sum_kernel[(programs,)](flat, shares, flat.numel(), BLOCK=BLOCK, num_warps=4)
    return shares.sum()


@_square_sum.register_fake
def _square_sum_fake(flat: Tensor) -> Tensor:
    return flat.new_empty((), dtype=torch.float64)


def unsupported(flat: Tensor, *rest: object, **options: object) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    return obstacle(flat)


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
    """As `adamw.adamw_`; a tensor `grad_scale` stays on the device."""
    check(master, grad, exp_avg, exp_avg_sq, param_out)
    if not isinstance(grad_scale, Tensor):
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=master.device)
    _adamw_(
        master, grad, exp_avg, exp_avg_sq, param_out, grad_scale.float(), lr, beta1, beta2, eps, weight_decay, step
    )  # fmt: skip


def square_sum(flat: Tensor) -> Tensor:
    """As `adamw.square_sum`."""
    check_flat("the buffer", flat, flat.numel())
    total: Tensor = _square_sum(flat)
    return total
