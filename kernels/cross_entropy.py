"""Cross-entropy over a (shard of the) vocabulary, with the gradient written over the logits: the specification in
PyTorch.

The work is cut where a collective may go. Every tensor rank takes four numbers per token from its columns; merging the
ranks' numbers (one all-gather) gives the numbers of the whole row, and from those both the loss and the gradient
follow:

    stats = (m = max z,  s = sum exp(z - m),  z_target,  sum z)                    cross_entropy_stats, merge_stats
    nll = log s - (z_target - m)                                                   cross_entropy_loss
    loss = (1 - e) nll + e (log s + m - sum z / V) + c (log s + m)^2               e label smoothing, c z-loss
    dloss/dz_j = p_j (1 + 2 c (log s + m)) - (1 - e) [j = target] - e / V          cross_entropy_grad_

nll is taken as written, not as logsumexp - z_target, which cancels when all logits share a large offset. Softmax
merging: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; z-loss: Chowdhery et al. 2022, "PaLM",
section 5. The Triton forms of `cross_entropy_stats` and `cross_entropy_grad_` are in `cross_entropy_triton.py`.

Shapes: N tokens, V columns of this shard (the last V - valid are padding), H hidden, R tensor ranks.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
PIECE_BYTES = 1 << 20  # rows are worked on in pieces whose fp32 form stays in the processor's cache
LOGITS_BYTES = 1 << 28  # logits that the fused linear layer holds at a time: 1024 tokens of a vocabulary of 128256
PRODUCT_BYTES = 1 << 27  # of a weight's gradient, in the factors' dtype, on its way into an fp32 sum


def check(logits_NV: Tensor, targets_N: Tensor, valid: int | None) -> int:
    """The number of true columns; ValueError where shapes or strides do not fit. All forms begin with it."""
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
    """Per token, over the first `valid` columns of this shard: max, sum of exp(z - max), target logit, sum of logits.

    logits_NV: any float dtype, last dimension contiguous; targets_N: int64 global token numbers; the shard's first
    column is token `vocab_start`. A target outside the shard (or ignored) contributes 0. Returns fp32 [N, 4] (float64
    for float64 logits). A shard without valid columns gives (-inf, 0, 0, 0), which `merge_stats` leaves out.
    """
    valid = check(logits_NV, targets_N, valid)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    stats_N4 = torch.zeros(logits_NV.shape[0], 4, dtype=wide, device=logits_NV.device)
    if valid == 0:
        stats_N4[:, 0] = -torch.inf
        return stats_N4
    local_N = targets_N - vocab_start
    inside_N = (local_N >= 0) & (local_N < valid)
    local_N = local_N.clamp(0, valid - 1)
    for rows in _pieces(logits_NV):
        z_NV = logits_NV[rows, :valid].to(wide)
        max_N = z_NV.amax(-1)
        stats_N4[rows, 0] = max_N
        stats_N4[rows, 2] = z_NV.gather(1, local_N[rows, None]).squeeze(1).where(inside_N[rows], 0)
        stats_N4[rows, 3] = z_NV.sum(-1)
        stats_N4[rows, 1] = (z_NV - max_N[:, None]).exp_().sum(-1)
    return stats_N4


def merge_stats(stats_RN4: Tensor) -> Tensor:
    """Merge the statistics of R shards [R, N, 4] into those of the whole vocabulary [N, 4]."""
    max_N = stats_RN4[..., 0].amax(0)
    scale_RN = (stats_RN4[..., 0] - max_N).exp()
    return torch.stack([max_N, (stats_RN4[..., 1] * scale_RN).sum(0), *stats_RN4[..., 2:].sum(0).unbind(-1)], dim=-1)


def cross_entropy_loss(
    stats_N4: Tensor,
    targets_N: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss per token [N] in the statistics' dtype, from merged statistics; 0 where the target is `ignore_index`.

    vocab_size: true columns of the whole vocabulary. A target outside [0, vocab_size) that is not `ignore_index` gives
    NaN: a wrong label is then seen in the first loss without a device synchronisation to look for it.
    """
    max_N, sum_N, target_N, total_N = stats_N4.unbind(-1)
    log_sum_N = sum_N.log()
    loss_N = log_sum_N - (target_N - max_N)
    if label_smoothing:
        loss_N = (1 - label_smoothing) * loss_N + label_smoothing * (log_sum_N - (total_N / vocab_size - max_N))
    if z_loss:
        loss_N = loss_N + z_loss * (log_sum_N + max_N).square()
    loss_N = loss_N.where((targets_N >= 0) & (targets_N < vocab_size), torch.nan)
    return loss_N.where(targets_N != ignore_index, 0.0)


def cross_entropy_grad_(
    logits_NV: Tensor,
    targets_N: Tensor,
    stats_N4: Tensor,
    grad_N: Tensor,
    *,
    vocab_start: int = 0,
    valid: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int,
) -> Tensor:
    """Write grad_N * dloss/dlogits over `logits_NV` and return it.

    stats_N4: merged over all shards; grad_N: fp32 scale per token (0 where ignored: such a row becomes exactly 0
    whatever its logits were); padded columns become 0.
    """
    valid = check(logits_NV, targets_N, valid)
    wide = stats_N4.dtype
    max_N, sum_N = stats_N4[:, 0], stats_N4[:, 1]
    grad_N = grad_N.to(wide)
    live_N = grad_N != 0
    lse_N = sum_N.log() + max_N
    scale_N = (grad_N * (1 + 2 * z_loss * lse_N) / sum_N).where(live_N, 0)
    local_N = targets_N - vocab_start
    hit_N = (grad_N * -(1 - label_smoothing)).where((local_N >= 0) & (local_N < valid), 0)
    local_N = local_N.clamp(0, max(valid - 1, 0))
    logits_NV[:, valid:] = 0
    for rows in _pieces(logits_NV) if valid else ():
        z_NV = (logits_NV[rows, :valid].to(wide) - max_N[rows, None]).exp_().mul_(scale_N[rows, None])
        if label_smoothing:
            z_NV -= (grad_N[rows, None]) * (label_smoothing / vocab_size)
        z_NV.scatter_add_(1, local_N[rows, None], hit_N[rows, None])
        logits_NV[rows, :valid] = z_NV.where(live_N[rows, None], 0)
    return logits_NV


def cross_entropy_stats_grad_(
    logits_NV: Tensor,
    targets_N: Tensor,
    grad_N: Tensor,
    *,
    valid: int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Both of the above where one rank holds the whole vocabulary: returns the statistics, writes the gradient.

    The exponentials of the statistics become the gradient, in place where the logits are wide enough.
    """
    valid = check(logits_NV, targets_N, valid)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    stats_N4 = torch.empty(logits_NV.shape[0], 4, dtype=wide, device=logits_NV.device)
    grad_N = grad_N.to(wide)
    dead_N = grad_N == 0
    some_dead = bool(dead_N.any())
    inside_N = (targets_N >= 0) & (targets_N < valid)
    hit_N = (grad_N * -(1 - label_smoothing)).where(inside_N, 0)
    local_N = targets_N.clamp(0, valid - 1)
    logits_NV[:, valid:] = 0
    for rows in _pieces(logits_NV):
        z_NV = logits_NV[rows, :valid].to(wide)
        max_N = z_NV.amax(-1)
        target_N = z_NV.gather(1, local_N[rows, None]).squeeze(1).where(inside_N[rows], 0)
        total_N = z_NV.sum(-1)
        sum_N = z_NV.sub_(max_N[:, None]).exp_().sum(-1)
        stats_N4[rows] = torch.stack([max_N, sum_N, target_N, total_N], dim=-1)
        z_NV.mul_((grad_N[rows] * (1 + 2 * z_loss * (sum_N.log() + max_N)) / sum_N)[:, None])
        if label_smoothing:
            z_NV -= (grad_N[rows, None]) * (label_smoothing / valid)
        z_NV.scatter_add_(1, local_N[rows, None], hit_N[rows, None])
        if some_dead:
            z_NV.masked_fill_(dead_N[rows, None], 0)
        if z_NV.dtype != logits_NV.dtype:
            logits_NV[rows, :valid] = z_NV
    return stats_N4


def _pieces(logits_NV: Tensor) -> list[slice]:
    rows, columns = logits_NV.shape
    step = max(1, PIECE_BYTES // (4 * max(columns, 1))) if logits_NV.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, ops: Any, options: dict[str, Any]) -> Tensor:
        valid = options["vocab_size"]
        stats_N4 = ops.cross_entropy_stats(logits_NV, targets_N, valid=valid)
        ctx.save_for_backward(logits_NV, targets_N, stats_N4)
        ctx.ops, ctx.options = ops, options
        loss_options = {name: value for name, value in options.items() if name != "overwrite_logits"}
        return cross_entropy_loss(stats_N4, targets_N, **loss_options)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, targets_N, stats_N4 = ctx.saved_tensors
        options = ctx.options
        grad_N = grad_N.where(targets_N != options["ignore_index"], 0)
        out_NV = logits_NV.detach() if options["overwrite_logits"] else logits_NV.detach().clone()
        ctx.ops.cross_entropy_grad_(
            out_NV,
            targets_N,
            stats_N4,
            grad_N,
            valid=options["vocab_size"],
            z_loss=options["z_loss"],
            label_smoothing=options["label_smoothing"],
            vocab_size=options["vocab_size"],
        )
        return out_NV, None, None, None


class ReferenceOps:
    """The kernels of this file as an object, the default of `ops` below (a `Kernels` value serves as well)."""

    cross_entropy_stats = staticmethod(cross_entropy_stats)
    cross_entropy_grad_ = staticmethod(cross_entropy_grad_)
    cross_entropy_stats_grad_ = staticmethod(cross_entropy_stats_grad_)


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    valid: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    overwrite_logits: bool = False,
    ops: Any = ReferenceOps,
) -> Tensor:
    """Differentiable loss per token [N] in one process.

    valid: true vocabulary size where the logits have padded columns. overwrite_logits: let the backward write the
    gradient over the logits (no memory beyond them; the caller must not read them again, nor run backward twice).
    """
    options = {
        "vocab_size": logits_NV.shape[1] if valid is None else valid,
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "overwrite_logits": overwrite_logits,
    }
    loss_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N, ops, options)
    return loss_N


def add_product_(total_VH: Tensor, grad_NV: Tensor, hidden_NH: Tensor) -> None:
    """total_VH += grad_NV^T @ hidden_NH, in the dtype of `total_VH` (fp32) whatever that of the factors.

    Narrow factors give a narrow product before it is added; it is made for some rows at a time (`PRODUCT_BYTES`).
    """
    if grad_NV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_NV.t(), hidden_NH)
        return
    for rows in _row_slices(total_VH, grad_NV.element_size()):
        total_VH[rows] += grad_NV[:, rows].t() @ hidden_NH


def _row_slices(x_VH: Tensor, itemsize: int) -> list[slice]:
    step = max(1, PRODUCT_BYTES // (itemsize * max(x_VH.shape[1], 1)))
    return [slice(start, start + step) for start in range(0, x_VH.shape[0], step)]


def chunk_rows(vocab: int, itemsize: int) -> int:
    """Tokens whose logits fill `LOGITS_BYTES`: in whole tiles of 128 where there are so many."""
    rows = max(1, LOGITS_BYTES // (itemsize * vocab))
    return rows // 128 * 128 or rows


def fused_linear_bytes(
    tokens: int, hidden: int, vocab: int, itemsize: int, *, chunk: int | None = None, main_grad: bool = False
) -> int:
    """Bytes that `fused_linear_cross_entropy` holds at its peak beyond its inputs and the gradients it gives back.

    In the forward one chunk of logits and, for a weight narrower than fp32, some rows of its gradient's product and,
    unless `main_grad` is given, the gradient's fp32 sum; in the backward, that sum beside the gradients made of it.
    Numbers per token (statistics, losses) are not counted. At 8192 tokens and 128256 x 4096 in bf16: 0.40 GB with
    `main_grad`, 2.50 GB without.
    """
    narrow, own_sum = itemsize < 4, 0 if main_grad else 4 * vocab * hidden
    product = min(PRODUCT_BYTES, vocab * hidden * itemsize) if narrow else 0
    logits = min(chunk or chunk_rows(vocab, itemsize), tokens) * vocab * itemsize
    return max(logits + product + own_sum * narrow, own_sum + tokens * hidden * itemsize + product)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, scale_N: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        train, chunk, main_grad_VH = settings["train"], settings["chunk"], settings["main_grad"]
        want_hidden, want_weight = (train and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden_NH = torch.empty_like(hidden_NH) if want_hidden else None
        grad_weight_VH = main_grad_VH if want_weight else None
        if want_weight and main_grad_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH, dtype=scale_N.dtype)
        total = torch.zeros((), dtype=scale_N.dtype, device=hidden_NH.device)
        buffer_NV = hidden_NH.new_empty(min(chunk, hidden_NH.shape[0]), weight_VH.shape[0])
        for start in range(0, hidden_NH.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_NV = buffer_NV[: len(scale_N[rows])]
            torch.mm(hidden_NH[rows], weight_VH.t(), out=logits_NV)
            total += _chunk_loss(logits_NV, targets_N[rows], scale_N[rows], want_hidden or want_weight, settings)
            if grad_hidden_NH is not None:
                torch.mm(logits_NV, weight_VH, out=grad_hidden_NH[rows])
            if grad_weight_VH is not None:
                add_product_(grad_weight_VH, logits_NV, hidden_NH[rows])
        own_VH = grad_weight_VH if main_grad_VH is None else None
        ctx.save_for_backward(grad_hidden_NH, own_VH)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = (
            None if saved is None else _scaled(saved, grad, dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return hidden, weight, None, None, None


def _chunk_loss(logits_NV: Tensor, targets_N: Tensor, scale_N: Tensor, train: bool, settings: dict[str, Any]) -> Tensor:
    """The scaled loss of one chunk; in training its logits become their gradient."""
    ops, valid, smooth = settings["ops"], settings["valid"], settings["smooth"]
    if train:
        stats_N4 = ops.cross_entropy_stats_grad_(logits_NV, targets_N, scale_N, valid=valid, **smooth)
    else:
        stats_N4 = ops.cross_entropy_stats(logits_NV, targets_N, valid=valid)
    ignore_index = settings["ignore_index"]
    loss_N = cross_entropy_loss(stats_N4, targets_N, vocab_size=valid, ignore_index=ignore_index, **smooth)
    return loss_N.mul(scale_N).where(scale_N != 0, 0).sum()


def _scaled(saved: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * grad in `dtype`; a narrower one for some rows at a time: no second wide copy of the whole."""
    if saved.dtype == dtype:
        return saved * grad
    result = torch.empty_like(saved, dtype=dtype)
    for rows in _row_slices(saved, saved.element_size()):
        result[rows] = saved[rows] * grad
    return result


def fused_linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    token_weights_N: Tensor | None = None,
    reduction: str = "mean",
    valid: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    main_grad: Tensor | None = None,
    ops: Any = ReferenceOps,
) -> Tensor:
    """Loss of `hidden_NH @ weight_VH.T` against `targets_N`, a scalar, never holding more than `chunk` rows of logits.

    The gradients are made in the forward, while a chunk's logits exist, so three matrix products are done (6 N H V
    flop) and nothing is computed again; `fused_linear_bytes` tells the memory. The weight's gradient is summed in fp32.
    token_weights_N: a factor per token (loss masks); reduction: "sum", or "mean" over the sum of the weights of the
    tokens that are not ignored (0 where there are none). valid: true vocabulary size where the weight has padded rows.
    chunk: tokens at a time, `chunk_rows` where not given. main_grad: fp32 [V, H], to which the weight's gradient is
    added straight away, in the forward; the weight then gets no other, and the loss must be what backward begins with
    (its own gradient 1), once. Without it the sum takes 4 V H bytes until backward. Raises ValueError for an unknown
    reduction and a `main_grad` that does not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    if main_grad is not None and (main_grad.shape != weight_VH.shape or main_grad.dtype != wide):
        raise ValueError(f"main_grad must be {wide} {tuple(weight_VH.shape)}, not {main_grad.dtype} {main_grad.shape}")
    kept_N = (targets_N != ignore_index).to(wide)
    scale_N = kept_N if token_weights_N is None else kept_N * token_weights_N.to(wide)
    if reduction == "mean":
        total = scale_N.sum()
        scale_N = scale_N / total.where(total != 0, 1)
    settings = {
        "ops": ops,
        "valid": weight_VH.shape[0] if valid is None else valid,
        "smooth": {"z_loss": z_loss, "label_smoothing": label_smoothing},
        "ignore_index": ignore_index,
        "chunk": chunk or chunk_rows(weight_VH.shape[0], hidden_NH.element_size()),
        "main_grad": main_grad,
        "train": torch.is_grad_enabled(),
    }
    loss: Tensor = _FusedLinear.apply(hidden_NH, weight_VH, targets_N, scale_N.detach(), settings)
    return loss
