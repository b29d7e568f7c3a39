"""Vocab-parallel cross-entropy in Triton. Specification, formulas and the way shards are merged: `cross_entropy.py`.

One program takes one row, in blocks that stay coalesced. The statistics read the logits once (N V b bytes for b bytes a
logit), with the running maximum of Milakov & Gimelshein 2018; the gradient reads and writes them once (2 N V b).
`cross_entropy_stats_grad_` does both in one launch, for one tensor rank: the row is read again right after the first
pass, and where the rows in flight (one for each multiprocessor: 34 MB at 132 x 128256 bf16) fit the L2 cache, that
read is free.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import check
from .layout import next_power_of_two, obstacle

BLOCK = 8192  # columns taken at once: 32 elements a thread
WARPS = 8
FUSED_WARPS = 16  # few, large programs keep the rows in flight inside the L2 cache


@triton.jit
def _row_stats(row_ptr, target, valid, BLOCK: tl.constexpr):
    """(max, sum exp(z - max), target logit or 0) of one row's first `valid` columns."""
    largest = tl.full([], float("-inf"), tl.float32)
    exponentials = tl.zeros([], tl.float32)
    for start in range(0, valid, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < valid, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(z, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # only -inf so far: exp(-inf - -inf) would be NaN
        exponentials = exponentials * tl.exp(largest - safe) + tl.sum(tl.exp(z - safe), axis=0)
        largest = new
    inside = (target >= 0) & (target < valid)
    at_target = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)
    return largest, exponentials, at_target


@triton.jit
def _row_grad(row_ptr, target, largest, exponentials, grad, columns, valid, z_loss, BLOCK: tl.constexpr):
    """Write the gradient over one row."""
    valid = tl.where(grad == 0.0, 0, valid)  # an ignored row is not read, and becomes 0 whatever it held
    scale = grad * (1 + 2 * z_loss * (tl.log(exponentials) + largest)) / exponentials
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        stored = tl.load(row_ptr + column, mask=column < valid, other=0.0)
        dz = tl.exp(stored.to(tl.float32) - largest) * scale
        dz -= tl.where(column == target, grad, 0.0)
        dz = tl.where(column < valid, dz, 0.0)
        tl.store(row_ptr + column, dz.to(stored.dtype), mask=column < columns)


@triton.jit
def stats_kernel(logits_ptr, targets_ptr, stats_ptr, row_stride, vocab_start, valid, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64) - vocab_start
    largest, exponentials, at_target = _row_stats(logits_ptr + row * row_stride, target, valid, BLOCK)
    tl.store(stats_ptr + row * 3, largest)
    tl.store(stats_ptr + row * 3 + 1, exponentials)
    tl.store(stats_ptr + row * 3 + 2, at_target)


@triton.jit
def grad_kernel(
    logits_ptr, targets_ptr, stats_ptr, grad_ptr, row_stride, vocab_start, columns, valid, z_loss,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64) - vocab_start
    largest, exponentials = tl.load(stats_ptr + row * 3), tl.load(stats_ptr + row * 3 + 1)
    grad = tl.load(grad_ptr + row)
    _row_grad(logits_ptr + row * row_stride, target, largest, exponentials, grad, columns, valid, z_loss, BLOCK)


@triton.jit
def stats_grad_kernel(
    logits_ptr, targets_ptr, stats_ptr, grad_ptr, row_stride, columns, valid, z_loss, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row).to(tl.int64)
    largest, exponentials, at_target = _row_stats(row_ptr, target, valid, BLOCK)
    tl.store(stats_ptr + row * 3, largest)
    tl.store(stats_ptr + row * 3 + 1, exponentials)
    tl.store(stats_ptr + row * 3 + 2, at_target)
    tl.debug_barrier()  # the target's logit has been read by every thread before it is overwritten
    _row_grad(row_ptr, target, largest, exponentials, tl.load(grad_ptr + row), columns, valid, z_loss, BLOCK)


def _block(columns: int) -> int:
    return min(BLOCK, next_power_of_two(columns))


@torch.library.custom_op("megalite::cross_entropy_stats", mutates_args=())
def _stats(logits_NV: Tensor, targets_N: Tensor, vocab_start: int, valid: int) -> Tensor:
    tokens, columns = logits_NV.shape
    stats_N3 = logits_NV.new_empty(tokens, 3, dtype=torch.float32)
    if tokens:
        stats_kernel[(tokens,)](
            logits_NV, targets_N.contiguous(), stats_N3, logits_NV.stride(0), vocab_start, valid,
            BLOCK=_block(columns), num_warps=WARPS,
        )  # fmt: skip
    return stats_N3


@_stats.register_fake
def _stats_fake(logits_NV: Tensor, targets_N: Tensor, vocab_start: int, valid: int) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape[0], 3, dtype=torch.float32)


@torch.library.custom_op("megalite::cross_entropy_grad_", mutates_args={"logits_NV"})
def _grad_(
    logits_NV: Tensor, targets_N: Tensor, stats_N3: Tensor, grad_N: Tensor, vocab_start: int, valid: int, z_loss: float
) -> None:  # fmt: skip
    tokens, columns = logits_NV.shape
    if tokens:
        grad_kernel[(tokens,)](
            logits_NV, targets_N.contiguous(), stats_N3.contiguous(), grad_N.float().contiguous(), logits_NV.stride(0),
            vocab_start, columns, valid, float(z_loss), BLOCK=_block(columns), num_warps=WARPS,
        )  # fmt: skip


@torch.library.custom_op("megalite::cross_entropy_stats_grad_", mutates_args={"logits_NV"})
def _stats_grad_(logits_NV: Tensor, targets_N: Tensor, grad_N: Tensor, valid: int, z_loss: float) -> Tensor:
    tokens, columns = logits_NV.shape
    stats_N3 = logits_NV.new_empty(tokens, 3, dtype=torch.float32)
    if tokens:
        stats_grad_kernel[(tokens,)](
            logits_NV, targets_N.contiguous(), stats_N3, grad_N.float().contiguous(), logits_NV.stride(0),
            columns, valid, float(z_loss), BLOCK=_block(columns), num_warps=FUSED_WARPS,
        )  # fmt: skip
    return stats_N3


@_stats_grad_.register_fake
def _stats_grad_fake(logits_NV: Tensor, targets_N: Tensor, grad_N: Tensor, valid: int, z_loss: float) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape[0], 3, dtype=torch.float32)


def unsupported(logits_NV: Tensor, *rest: object, **options: object) -> str | None:
    """Why these arguments cannot take the Triton path, or None."""
    return obstacle(logits_NV)


def cross_entropy_stats(
    logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int = 0, valid: int | None = None
) -> Tensor:
    """As `cross_entropy.cross_entropy_stats`."""
    stats_N3: Tensor = _stats(logits_NV, targets_N, vocab_start, check(logits_NV, targets_N, valid))
    return stats_N3


def cross_entropy_grad_(
    logits_NV: Tensor,
    targets_N: Tensor,
    stats_N3: Tensor,
    grad_N: Tensor,
    *,
    vocab_start: int = 0,
    valid: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """As `cross_entropy.cross_entropy_grad_`."""
    valid = check(logits_NV, targets_N, valid)
    _grad_(logits_NV, targets_N, stats_N3, grad_N, vocab_start, valid, z_loss)
    return logits_NV


def cross_entropy_stats_grad_(
    logits_NV: Tensor, targets_N: Tensor, grad_N: Tensor, *, valid: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """As `cross_entropy.cross_entropy_stats_grad_`."""
    valid = check(logits_NV, targets_N, valid)
    stats_N3: Tensor = _stats_grad_(logits_NV, targets_N, grad_N, valid, z_loss)
    return stats_N3
