"""Cross-entropy over a (shard of the) vocabulary, with the gradient written over the logits: the specification in
PyTorch.

The work is cut where a collective may go. Every tensor rank takes three numbers per token from its columns; merging the
ranks' numbers (one all-gather) gives the numbers of the whole row, and from those both the loss and the gradient
follow:

    stats = (m = max z,  s = sum exp(z - m),  z_target)                cross_entropy_stats, merge_stats
    nll = log s - (z_target - m)                                       cross_entropy_loss
    loss = nll + c (log s + m)^2                                       c z-loss
    dloss/dz_j = p_j (1 + 2 c (log s + m)) - [j = target]              cross_entropy_grad_

nll is taken as written, not as logsumexp - z_target, which cancels when all logits share a large offset. Softmax
merging: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; z-loss: Chowdhery et al. 2022, "PaLM",
section 5. The Triton forms of `cross_entropy_stats` and `cross_entropy_grad_` are in `cross_entropy_triton.py`.

Shapes: N tokens, V columns of this shard (the last V - valid are padding), H hidden, R tensor ranks.
"""

import torch
from torch import Tensor

from .accumulate import accumulate_product

IGNORE_INDEX = -100  # label of a position that does not count in the loss
PIECE_BYTES = 1 << 20  # rows are processed in pieces whose fp32 form fits in the CPU cache
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # logits that the output layer materialises at a time
TILE_ROWS = 256  # GEMM tile on a GPU: a chunk that ends within a tile wastes the rest of it
PRODUCT_BYTES = 1 << 27  # block of a weight gradient in the operands' dtype, before it is added to the fp32 sum


def check(logits_NV: Tensor, targets_N: Tensor, valid: int | None) -> int:
    """The number of true columns; ValueError if shapes or strides do not fit. Every form calls it first."""
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"logits must be [N, V], targets [N], not {tuple(logits_NV.shape)}, {tuple(targets_N.shape)}")
    if logits_NV.shape[1] > 1 and logits_NV.stride(1) != 1:
        raise ValueError(f"logits must be contiguous in their last dimension, not have strides {logits_NV.stride()}")
    if valid is not None and not 0 <= valid <= logits_NV.shape[1]:
        raise ValueError(f"valid must be between 0 and the {logits_NV.shape[1]} columns, not {valid}")
    return logits_NV.shape[1] if valid is None else valid


def cross_entropy_stats(
    logits_NV: Tensor, targets_N: Tensor, *, vocab_start: int = 0, valid: int | None = None
) -> Tensor:
    """Per token, over the first `valid` columns of this shard: max, sum of exp(z - max), target logit.

    logits_NV: any float dtype, last dimension contiguous; targets_N: int64 global token numbers; the shard's first
    column is token `vocab_start`. A target outside the shard (or ignored) contributes 0. Returns fp32 [N, 3] (float64
    for float64 logits). A shard without valid columns gives (-inf, 0, 0), which `merge_stats` leaves out.
    """
    valid = check(logits_NV, targets_N, valid)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    stats_N3 = torch.zeros(logits_NV.shape[0], 3, dtype=wide, device=logits_NV.device)
    if valid == 0:
        stats_N3[:, 0] = -torch.inf
        return stats_N3
    local_N = targets_N - vocab_start
    inside_N = (local_N >= 0) & (local_N < valid)
    local_N = local_N.clamp(0, valid - 1)
    for rows in _pieces(logits_NV):
        z_NV = logits_NV[rows, :valid].to(wide)
        max_N = z_NV.amax(-1)
        stats_N3[rows, 0] = max_N
        stats_N3[rows, 2] = z_NV.gather(1, local_N[rows, None]).squeeze(1).where(inside_N[rows], 0)
        stats_N3[rows, 1] = (z_NV - max_N[:, None]).exp_().sum(-1)
    return stats_N3


def merge_stats(stats_RN3: Tensor) -> Tensor:
    """Merge the statistics of R shards [R, N, 3] into those of the whole vocabulary [N, 3]."""
    max_N = stats_RN3[..., 0].amax(0)
    scale_RN = (stats_RN3[..., 0] - max_N).exp()
    return torch.stack([max_N, (stats_RN3[..., 1] * scale_RN).sum(0), stats_RN3[..., 2].sum(0)], dim=-1)


def cross_entropy_loss(stats_N3: Tensor, targets_N: Tensor, *, vocab_size: int, z_loss: float = 0.0) -> Tensor:
    """Loss per token [N] in the statistics' dtype, from merged statistics; 0 where the target is `IGNORE_INDEX`.

    vocab_size: true columns of the whole vocabulary. Any other target outside [0, vocab_size) gives NaN: a wrong label
    is then seen in the first loss without a device synchronisation to look for it.
    """
    max_N, sum_N, target_N = stats_N3.unbind(-1)
    log_sum_N = sum_N.log()
    loss_N = log_sum_N - (target_N - max_N)
    if z_loss:
        loss_N = loss_N + z_loss * (log_sum_N + max_N).square()
    loss_N = loss_N.where((targets_N >= 0) & (targets_N < vocab_size), torch.nan)
    return loss_N.where(targets_N != IGNORE_INDEX, 0.0)


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
    """Write grad_N * dloss/dlogits over `logits_NV` and return it.

    stats_N3: merged over all shards; grad_N: fp32 scale per token (0 where ignored: such a row becomes exactly 0
    whatever its logits were); padded columns become 0.
    """
    valid = check(logits_NV, targets_N, valid)
    wide = stats_N3.dtype
    max_N, sum_N = stats_N3[:, 0], stats_N3[:, 1]
    grad_N = grad_N.to(wide)
    live_N = grad_N != 0
    lse_N = sum_N.log() + max_N
    scale_N = (grad_N * (1 + 2 * z_loss * lse_N) / sum_N).where(live_N, 0)
    local_N = targets_N - vocab_start
    hit_N = (-grad_N).where((local_N >= 0) & (local_N < valid), 0)
    local_N = local_N.clamp(0, max(valid - 1, 0))
    logits_NV[:, valid:] = 0
    for rows in _pieces(logits_NV) if valid else ():
        z_NV = (logits_NV[rows, :valid].to(wide) - max_N[rows, None]).exp_().mul_(scale_N[rows, None])
        z_NV.scatter_add_(1, local_N[rows, None], hit_N[rows, None])
        logits_NV[rows, :valid] = z_NV.where(live_N[rows, None], 0)
    return logits_NV


def cross_entropy_stats_grad_(
    logits_NV: Tensor, targets_N: Tensor, grad_N: Tensor, *, valid: int | None = None, z_loss: float = 0.0
) -> Tensor:
    """Both of the above if one rank holds the whole vocabulary: returns the statistics, writes the gradient.

    The exponentials of the statistics become the gradient, in place where the logits are wide enough.
    """
    valid = check(logits_NV, targets_N, valid)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    stats_N3 = torch.empty(logits_NV.shape[0], 3, dtype=wide, device=logits_NV.device)
    grad_N = grad_N.to(wide)
    dead_N = grad_N == 0
    some_dead = logits_NV.device.type != "cpu" or bool(dead_N.any())  # on other devices the check would synchronise
    inside_N = (targets_N >= 0) & (targets_N < valid)
    hit_N = (-grad_N).where(inside_N, 0)
    local_N = targets_N.clamp(0, valid - 1)
    logits_NV[:, valid:] = 0
    for rows in _pieces(logits_NV):
        z_NV = logits_NV[rows, :valid].to(wide)
        max_N = z_NV.amax(-1)
        target_N = z_NV.gather(1, local_N[rows, None]).squeeze(1).where(inside_N[rows], 0)
        sum_N = z_NV.sub_(max_N[:, None]).exp_().sum(-1)
        stats_N3[rows] = torch.stack([max_N, sum_N, target_N], dim=-1)
        z_NV.mul_((grad_N[rows] * (1 + 2 * z_loss * (sum_N.log() + max_N)) / sum_N)[:, None])
        z_NV.scatter_add_(1, local_N[rows, None], hit_N[rows, None])
        if some_dead:
            z_NV.masked_fill_(dead_N[rows, None], 0)
        if z_NV.dtype != logits_NV.dtype:
            logits_NV[rows, :valid] = z_NV
    return stats_N3


def _pieces(logits_NV: Tensor) -> list[slice]:
    rows, columns = logits_NV.shape
    step = max(1, PIECE_BYTES // (4 * max(columns, 1))) if logits_NV.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def add_product_(total_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    """total_VH += grad_NV^T @ hidden_NH, see `accumulate_product`. Where there is a product before it is added, it is
    made for some rows at a time (`PRODUCT_BYTES`)."""
    accumulate_product(total_VH, grad_NV, hidden_NH, block_bytes=PRODUCT_BYTES)


def chunk_rows(columns: int, device: torch.device) -> int:
    """Number of tokens whose logits an output layer with `columns` columns computes at a time; whole tiles on a GPU."""
    rows = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // max(columns, 1))
    return rows // TILE_ROWS * TILE_ROWS or rows if device.type == "cuda" else rows
