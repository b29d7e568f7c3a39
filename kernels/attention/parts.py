"""Attention over a part of the keys, in two halves: what context parallelism computes before and after it communicates.

A rank has some rows of a sequence as queries and sees the keys of the whole sequence, or of one other rank at a time.
The halves are called by hand, since between them the keys are given back and fetched again. All that a mask of a
language model says about sorted rows is an interval of keys for each query (`Seen`).

Results over several parts are merged by their log-sum-exp (`merge`). The gradients of a part need no more than the
merged output and log-sum-exp: p = exp(score - lse) is then the probability among all keys (Dao et al. 2022,
"FlashAttention", section 3.1; Liu et al. 2023, "Ring Attention with Blockwise Transformers").

Shapes: S queries, T keys of the part, B batch, H query heads, K kv heads, D head dim, G = H / K query heads of one kv
head; in a block s of the queries and t of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .reference import grouped, merge_heads

_BLOCK_ELEMENTS = 1 << 24  # scores of all heads that the plain form has at a time


@dataclass(frozen=True)
class Seen:
    """Query i sees the part's keys [first[i], last[i]), int64 [1 or B, S], contiguous; neither falls as i grows."""

    first_BS: Tensor
    last_BS: Tensor
    keys: int

    @staticmethod
    def between(
        query_rows_S: Tensor, key_rows_T: Tensor, begins_BS: Tensor | None = None, window: int | None = None
    ) -> Seen:
        """Causal attention among rows of a sequence: int64, ascending, their places in it.

        A query sees no key after its own row, none before the row in `begins_BS` [B, S] (where its document begins),
        and no more than `window` rows, its own included.
        """
        lowest_BS = torch.zeros_like(query_rows_S)[None] if begins_BS is None else begins_BS
        if window is not None:
            lowest_BS = torch.maximum(lowest_BS, query_rows_S - (window - 1))
        after_BS = (query_rows_S + 1).expand_as(lowest_BS)
        first_BS, last_BS = (torch.searchsorted(key_rows_T, x.contiguous()) for x in (lowest_BS, after_BS))
        return Seen(first_BS, last_BS, len(key_rows_T))

    @cached_property
    def seen_2BS(self) -> Tensor:
        """Both bounds as one int32 table, for kernels."""
        return torch.stack((self.first_BS, self.last_BS)).int()

    @cached_property
    def seeing_2BT(self) -> Tensor:
        """The same for the keys; see `seeing_queries`."""
        return seeing_queries(self.first_BS, self.last_BS, self.keys)


def seeing_queries(first_BS: Tensor, last_BS: Tensor, keys: int) -> Tensor:
    """For each key the first query that sees it and the one after the last, int32 [2, B, T], where query i sees the
    keys [first[i], last[i])."""
    keys_BT = torch.arange(keys, device=first_BS.device).expand(len(first_BS), -1).contiguous()
    bounds = (torch.searchsorted(x.contiguous(), keys_BT, right=True) for x in (last_BS, first_BS))
    return torch.stack(tuple(bounds)).int()


class AttentionParts(Protocol):
    """A form of attention over parts. `scale` multiplies the scores; `softcap` bounds them where given."""

    def forward(
        self, q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, seen: Seen, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out_SBHD in q's dtype, log-sum-exp of the scores fp32 [B, H, S]); 0 and -inf where a query sees nothing."""
        ...

    def backward(
        self,
        grad_SBHD: Tensor,
        q_SBHD: Tensor,
        k_TBKD: Tensor,
        v_TBKD: Tensor,
        out_SBHD: Tensor,
        lse_BHS: Tensor,
        seen: Seen,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part's terms of the gradients of q, k and v; out and lse are those over all parts."""
        ...


def merge(out_SBHD: Tensor, lse_BHS: Tensor, other_SBHD: Tensor, other_lse_BHS: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over two disjoint sets of keys, from those over each; fp32 [S, B, H, D] and [B, H, S]."""
    total_BHS = torch.logaddexp(lse_BHS, other_lse_BHS)
    # Over nothing at all the weights would be exp(-inf - -inf).
    base_BHS = total_BHS.where(total_BHS > -torch.inf, 0)
    one, other = ((lse - base_BHS).exp().permute(2, 0, 1).unsqueeze(-1) for lse in (lse_BHS, other_lse_BHS))
    return out_SBHD * one + other_SBHD * other, total_BHS


class PlainParts:
    """Products over blocks of queries, on every device; fp32 inside (float64 for float64)."""

    def forward(
        self, q_SBHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, seen: Seen, scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q_SBHD.dtype, torch.float32)
        outs, lses = [], []
        for rows in _blocks(q_SBHD, seen):
            q_BKGsD, k_BK1TD, v_BK1TD = (x.to(wide) for x in grouped(q_SBHD[rows], k_TBKD, v_TBKD))
            scores_BKGsT, _ = _scores(q_BKGsD, k_BK1TD, seen, rows, scale, softcap)
            lse_BKGs = scores_BKGsT.logsumexp(-1)
            p_BKGsT = (scores_BKGsT - lse_BKGs.where(lse_BKGs > -torch.inf, 0).unsqueeze(-1)).exp()
            outs.append(merge_heads(p_BKGsT @ v_BK1TD).to(q_SBHD.dtype))
            lses.append(lse_BKGs.flatten(1, 2))
        return torch.cat(outs), torch.cat(lses, -1)

    def backward(
        self,
        grad_SBHD: Tensor,
        q_SBHD: Tensor,
        k_TBKD: Tensor,
        v_TBKD: Tensor,
        out_SBHD: Tensor,
        lse_BHS: Tensor,
        seen: Seen,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(q_SBHD.dtype, torch.float32)
        grad_q = torch.empty_like(q_SBHD)
        grad_k_BKTD, grad_v_BKTD = (torch.zeros_like(k_TBKD.permute(1, 2, 0, 3), dtype=wide) for _ in range(2))
        for rows in _blocks(q_SBHD, seen):
            q_BKGsD, k_BK1TD, v_BK1TD = (x.to(wide) for x in grouped(q_SBHD[rows], k_TBKD, v_TBKD))
            grad_BKGsD, out_BKGsD = (grouped(x[rows], k_TBKD, v_TBKD)[0].to(wide) for x in (grad_SBHD, out_SBHD))
            scores_BKGsT, damp = _scores(q_BKGsD, k_BK1TD, seen, rows, scale, softcap)
            lse_BKGs1 = lse_BHS[..., rows].unflatten(1, (k_TBKD.shape[2], -1)).unsqueeze(-1)
            p_BKGsT = (scores_BKGsT - lse_BKGs1.where(lse_BKGs1 > -torch.inf, 0)).exp()
            grad_v_BKTD += (p_BKGsT.mT @ grad_BKGsD).sum(2)
            along_BKGs1 = (grad_BKGsD * out_BKGsD).sum(-1, keepdim=True)
            grad_s_BKGsT = p_BKGsT * (grad_BKGsD @ v_BK1TD.mT - along_BKGs1) * damp * scale
            grad_k_BKTD += (grad_s_BKGsT.mT @ q_BKGsD).sum(2)
            grad_q[rows] = merge_heads(grad_s_BKGsT @ k_BK1TD).to(grad_q.dtype)
        grad_k, grad_v = (x.permute(2, 0, 1, 3).to(k_TBKD.dtype) for x in (grad_k_BKTD, grad_v_BKTD))
        return grad_q, grad_k, grad_v


def _blocks(q_SBHD: Tensor, seen: Seen) -> Iterator[slice]:
    queries, batch, heads, _ = q_SBHD.shape
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * seen.keys))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def _scores(
    q_BKGsD: Tensor, k_BK1TD: Tensor, seen: Seen, rows: slice, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """(masked scores, the factor by which the soft cap damps their gradient)"""
    scores_BKGsT = q_BKGsD @ k_BK1TD.mT * scale
    damp: Tensor | float = 1.0
    if softcap is not None:
        bent_BKGsT = torch.tanh(scores_BKGsT / softcap)
        scores_BKGsT, damp = softcap * bent_BKGsT, 1 - bent_BKGsT * bent_BKGsT
    key_T = torch.arange(seen.keys, device=q_BKGsD.device)
    first_Bs1, last_Bs1 = (x[:, rows].unsqueeze(-1) for x in (seen.first_BS, seen.last_BS))
    visible_B11sT = ((key_T >= first_Bs1) & (key_T < last_Bs1))[:, None, None]
    return scores_BKGsT.masked_fill(~visible_B11sT, -torch.inf), damp


PLAIN_PARTS: AttentionParts = PlainParts()
