"""Attention whose bits do not depend on the batch, on how many queries come at once, or on padding before the text.

Every product has one shape: `ROWS` queries of one head with `KEYS` keys, padded where there are fewer. Blocks of keys
are counted from the beginning of the text, wherever it stands in its row, and are added one after the other; what a
query does not see adds 0. So the row of a query is the same whether it is computed with its whole sequence or alone,
from a cache. Backward is that of `parts.py`, for gradients are needed of whole batches alone.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim, G = H / K; C blocks of keys, X = K * B,
R = G * ROWS rows of a product, E the columns of one with the values.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .parts import AttentionParts, Seen
from .reference import Options, document_begins, read_options

ROWS, KEYS = 8, 32

LEAST_COLUMNS = 16
"""Of a product's result. Libraries compute narrower ones in a way of their own, in which the order of a row's sums can
depend on its place (MKL in fp32: below 12 columns, on some processors)."""

_SCORES = 1 << 24
"""Scores that are in memory at a time, at least those of one block of queries of one sequence."""


class BatchInvariantAttention:
    """A form of attention (`megalite.kernels.attention`): causal, without log-sum-exp, fp32 inside.

    It holds for the last document of a row, and for rows without documents; earlier documents are computed rightly, but
    their bits depend on where they stand.
    """

    def __init__(self, parts: AttentionParts) -> None:
        self.parts = parts

    def __call__(self, q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, **options: Any) -> Tensor:
        asked = read_options(q_SBHD, k_TBKD, v_TBKD, options)
        if not asked.causal or asked.return_lse or len(q_SBHD) > len(k_TBKD):
            raise ValueError("batch-invariant attention is causal, of a sequence or its end, without log-sum-exp")
        out_SBHD: Tensor = _Attention.apply(q_SBHD, k_TBKD, v_TBKD, asked, self.parts)
        return out_SBHD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, asked: Options, parts: AttentionParts
    ) -> Tensor:
        seen, begins_B = _sight(q_SBHD, k_TBKD, asked)
        each = max(1, _SCORES // (len(k_TBKD) * ROWS * q_SBHD.shape[2]))
        rows = []
        for start in range(0, q_SBHD.shape[1], each):
            part = slice(start, start + each)
            sight = seen.first_BS[part], seen.last_BS[part], begins_B[part]
            rows.append(_attend(q_SBHD[:, part], k_TBKD[:, part], v_TBKD[:, part], sight, asked))
        out_SBHD = torch.cat([out for out, _ in rows], 1)
        ctx.save_for_backward(q_SBHD, k_TBKD, v_TBKD, out_SBHD, torch.cat([lse for _, lse in rows]))
        ctx.seen, ctx.asked, ctx.parts = seen, asked, parts
        return out_SBHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBHD: Tensor) -> Any:
        saved, scale = ctx.saved_tensors, ctx.asked.scale_for(ctx.saved_tensors[0])
        return *ctx.parts.backward(grad_SBHD, *saved, ctx.seen, scale, ctx.asked.softcap), None, None


def _sight(q_SBHD: Tensor, k_TBKD: Tensor, asked: Options) -> tuple[Seen, Tensor]:
    """(the keys that each query sees, [B, S]; where each row's last document begins, [B])."""
    (queries, batch), keys, documents = q_SBHD.shape[:2], len(k_TBKD), asked.packed
    places_T = torch.arange(keys, device=q_SBHD.device)
    begins_BT = places_T.new_zeros(batch, keys)
    if documents is not None:
        begins_BT = documents.once("begins", document_begins).t()
    begins_BS = begins_BT[:, keys - queries :]
    return Seen.between(places_T[keys - queries :], places_T, begins_BS, asked.window), begins_BT[:, -1]


def _attend(
    q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, sight: tuple[Tensor, Tensor, Tensor], asked: Options
) -> tuple[Tensor, Tensor]:
    """(out_SBHD, log-sum-exp fp32 [B, H, S]); `sight` are the first key that each query sees and the one after its last
    [B, S], and where each row's last document begins [B]."""
    *seen, begins_B = sight
    (queries, batch, heads, width), (keys, _, kv_heads, _) = q_SBHD.shape, k_TBKD.shape
    blocks, begins = -(-keys // KEYS), begins_B.tolist()
    # Row b's keys from its text's beginning on, and then those before it; places beyond all keys are seen by nobody.
    order_BT = torch.arange(blocks * KEYS, device=q_SBHD.device).repeat(batch, 1)
    beyond_BT = order_BT >= keys
    order_BT = (order_BT + begins_B[:, None]).remainder_(keys)
    k_XCDN = _blocks(k_TBKD, begins, blocks, width).transpose(-1, -2)
    # beyond the values columns of ones, at least one: the sums of probabilities
    v_XCNE = _blocks(v_TBKD, begins, blocks, max(width + 1, LEAST_COLUMNS))
    scale, out_SBHD = asked.scale_for(q_SBHD), torch.empty_like(q_SBHD)
    lse_BHS = torch.empty((batch, heads, queries), device=q_SBHD.device)
    for start in range(0, queries, ROWS):
        part, count = slice(start, start + ROWS), min(ROWS, queries - start)
        q_X1RD = _rows(q_SBHD[part], kv_heads).mul_(scale).unsqueeze(1)
        scores_XCRN = torch.matmul(q_X1RD, k_XCDN)
        if asked.softcap is not None:
            scores_XCRN = scores_XCRN.div_(asked.softcap).tanh_().mul_(asked.softcap)
        first_BS, last_BS = (bound_BS[:, part, None] for bound_BS in seen)
        hidden_BST = (order_BT[:, None] < first_BS) | (order_BT[:, None] >= last_BS) | beyond_BT[:, None]
        view = scores_XCRN.view(batch, kv_heads, blocks, heads // kv_heads, ROWS, KEYS)
        hidden_BCSN = hidden_BST.unflatten(2, (blocks, KEYS)).transpose(1, 2)
        view[..., :count, :].masked_fill_(hidden_BCSN[:, None, :, None], -torch.inf)
        top_X1R1 = scores_XCRN.amax((1, 3), keepdim=True)
        top_X1R1 = top_X1R1.where(top_X1R1 > -torch.inf, 0)
        terms_XCRE = torch.matmul(scores_XCRN.sub_(top_X1R1).exp_(), v_XCNE)
        total_XRE = terms_XCRE[:, 0].clone()
        for block in range(1, blocks):
            total_XRE += terms_XCRE[:, block]
        sum_XR1 = total_XRE[..., width : width + 1]
        out_XRD = total_XRE[..., :width] / sum_XR1.where(sum_XR1 > 0, 1)
        out_SBHD[part] = out_XRD.view(batch, heads, ROWS, width)[:, :, :count].permute(2, 0, 1, 3)
        lse_XR1 = sum_XR1.log() + top_X1R1.squeeze(1)
        lse_BHS[:, :, part] = lse_XR1.view(batch, heads, ROWS)[:, :, :count]
    return out_SBHD, lse_BHS


def _blocks(x_TBKD: Tensor, begins: list[int], blocks: int, width: int) -> Tensor:
    """Every row from its beginning on, then what is before that, then zeros, cut into blocks: fp32 [X, C, KEYS, width],
    contiguous. Columns beyond those of `x_TBKD` are 1."""
    (keys, batch, kv_heads, own), x_BKTD = x_TBKD.shape, x_TBKD.permute(1, 2, 0, 3)
    to_BKTE = torch.ones((batch, kv_heads, blocks * KEYS, width), device=x_TBKD.device)
    to_BKTE[:, :, keys:, :own] = 0
    alike = len(set(begins)) == 1
    for row, begin in enumerate(begins[:1] if alike else begins):
        rows = slice(None) if alike else slice(row, row + 1)
        to_BKTE[rows, :, : keys - begin, :own] = x_BKTD[rows, :, begin:]
        to_BKTE[rows, :, keys - begin : keys, :own] = x_BKTD[rows, :, :begin]
    return to_BKTE.view(batch * kv_heads, blocks, KEYS, width)


def _rows(q_SBHD: Tensor, kv_heads: int) -> Tensor:
    """Up to ROWS queries, padded with zeros: fp32 [X, R, D], a new tensor."""
    count, batch, heads, width = q_SBHD.shape
    q_BHSD = torch.zeros((batch, heads, ROWS, width), device=q_SBHD.device)
    q_BHSD[:, :, :count] = q_SBHD.permute(1, 2, 0, 3)
    return q_BHSD.view(batch * kv_heads, heads // kv_heads * ROWS, width)
