"""Attention of a rank's rows to a whole sequence that is split over the ranks (`megalite.parallel.context`).

    gather    keys and values of all ranks are gathered, in backward again, and their gradients reduce-scattered
    ring      they are passed round from rank to rank, under the attention to those of the rank before; the results
              are merged by their log-sum-exp (Liu et al. 2023, "Ring Attention with Blockwise Transformers")
    ulysses   an all-to-all swaps rows for heads, so that each rank has some heads of the whole sequence, and back
              (Jacobs et al. 2023, "DeepSpeed Ulysses"); a key/value head goes to every rank whose queries read it

Until backward, gather and ring keep what one rank alone would of its rows: queries, keys, values, output, log-sum-exp.

Shapes: n ranks, S tokens of a sequence with padding, s = S / n those of this rank, B batch, H query heads, K kv heads,
D head dim. KV stacks keys and values. Under ulysses a rank gets h query and k kv heads of all rows; E are heads of any
kind, e = h + 2 k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.kernels import Kernels
from megalite.kernels.attention import Documents, Options
from megalite.kernels.attention.parts import AttentionParts, Seen, merge
from megalite.kernels.attention.reference import document_begins
from megalite.kernels.attention.widths import padded
from megalite.mesh import Group
from megalite.parallel.collectives import all_gather_stacked
from megalite.parallel.context import ContextRegion
from megalite.parallel.heads import HeadSplit, split_heads


class CachedRows(Documents):
    """The documents of a sequence that is being generated, int [T, B], and the rows of it that this rank has cached.

    The one query is the last row, the same on every rank.
    """

    def __init__(self, numbers_TB: Tensor, rows_t: Tensor) -> None:
        super().__init__(numbers_TB)
        self.rows_t = rows_t

    def seen(self, window: int | None) -> Seen:
        """What the query sees of the cached keys."""

        def make(numbers_TB: Tensor) -> Seen:
            last_1 = torch.arange(len(numbers_TB) - 1, len(numbers_TB), device=numbers_TB.device)
            return Seen.between(last_1, self.rows_t, document_begins(numbers_TB)[-1:].t(), window)

        return self.once(("cached", window), make)


class ContextAttention:
    """Takes the place of a form of attention (`megalite.kernels.attention`) where the sequence is split.

    q_sBHD [s, B, H, D]; k_sBKD and v_sBKD [s, B, K, D]; `documents` are those of the whole sequence, [S, B], padding
    included. Causal attention of a sequence to itself alone, without log-sum-exp; with `CachedRows` that of its last
    row, q_1BHD, to the keys that the ranks have cached. Every rank of the group calls it.
    """

    def __init__(self, region: ContextRegion, kernels: Kernels) -> None:
        self.region, self.kernels = region, kernels
        self._exchanges: dict[tuple[int, int], _HeadExchange] = {}
        self._sights: dict[tuple[int, int | None, int | None], Seen] = {}

    def __call__(self, q_sBHD: Tensor, k_sBKD: Tensor, v_sBKD: Tensor, **options: Any) -> Tensor:
        width = v_sBKD.shape[-1]
        if k_sBKD.shape[-1] != width:  # parts of a sequence travel as one tensor, and heads likewise
            options["scale"] = Options(**options).scale_for(q_sBHD)
            return self(*padded(q_sBHD, k_sBKD, v_sBKD), **options)[..., :width]
        asked = Options(**options)
        if isinstance(asked.documents, CachedRows):
            seen, scale = asked.documents.seen(asked.window), asked.scale_for(q_sBHD)
            parts = self.kernels.attention_parts
            out_1BHD, lse_BH1 = parts.forward(q_sBHD, k_sBKD, v_sBKD, seen, scale, asked.softcap)
            return _merge_over_ranks(out_1BHD, lse_BH1, self.region)
        if not asked.causal or asked.return_lse or len(q_sBHD) != len(k_sBKD):
            raise ValueError("a split sequence has causal attention to itself alone, without cache and log-sum-exp")
        if self.region.mode == "ulysses":
            heads = q_sBHD.shape[2], k_sBKD.shape[2]
            if heads not in self._exchanges:
                self._exchanges[heads] = _HeadExchange(*heads, self.region, q_sBHD.device)
            return self._exchanges[heads](q_sBHD, k_sBKD, v_sBKD, self.kernels.attention, **options)
        length = len(q_sBHD)
        call = _Call(
            self.region,
            self.kernels.attention_parts,
            lambda source: self.seen(length, source, asked.packed, asked.window),
            asked.scale_for(q_sBHD),
            asked.softcap,
        )
        mode = _Gathered if self.region.mode == "gather" else _Ring
        result: Tensor = mode.apply(q_sBHD, k_sBKD, v_sBKD, call)
        return result

    def seen(self, length: int, source: int | None, documents: Documents | None, window: int | None) -> Seen:
        """What this rank's `length` rows see of those of rank `source` of the group, or of all rows (None)."""
        key = (length, source, window)
        if documents is not None:
            return documents.once(("seen", *key), lambda numbers_SB: self._see(*key, document_begins(numbers_SB).t()))
        if key not in self._sights:
            self._sights[key] = self._see(*key, None)
        return self._sights[key]

    def _see(self, length: int, source: int | None, window: int | None, begins_BS: Tensor | None) -> Seen:
        region, whole = self.region, length * self.region.size
        rows_s = region.rows(whole)
        keys = torch.arange(whole, device=region.device) if source is None else region.rows(whole, source)
        return Seen.between(rows_s, keys, None if begins_BS is None else begins_BS[:, rows_s], window)


@dataclass(frozen=True)
class _Call:
    """What a call needs besides its tensors; `seen` as `ContextAttention.seen`, of a source."""

    region: ContextRegion
    parts: AttentionParts
    seen: Callable[[int | None], Seen]
    scale: float
    softcap: float | None

    def forward(self, q: Tensor, kv: Tensor, source: int | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp over keys and values [rows, 2, B, K, D] of a rank, or of all."""
        return self.parts.forward(q, *kv.unbind(1), self.seen(source), self.scale, self.softcap)

    def backward(
        self, grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, source: int | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of q, and of keys and values as they are stacked."""
        given = (grad, q, *kv.unbind(1), out, lse)
        grad_q, *grads = self.parts.backward(*given, self.seen(source), self.scale, self.softcap)
        return grad_q, torch.stack(grads, 1)


class _Gathered(Function):
    spmd = "q_sBHD: V, k_sBKD: V, v_sBKD: V -> V"

    @staticmethod
    def forward(ctx: Any, q_sBHD: Tensor, k_sBKD: Tensor, v_sBKD: Tensor, call: _Call) -> Tensor:
        kv_S2BKD = call.region.gather_rows(torch.stack((k_sBKD, v_sBKD), 1))
        out_sBHD, lse_BHs = call.forward(q_sBHD, kv_S2BKD, None)
        ctx.save_for_backward(q_sBHD, k_sBKD, v_sBKD, out_sBHD, lse_BHs)
        ctx.call = call
        return out_sBHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sBHD: Tensor) -> Any:
        q_sBHD, k_sBKD, v_sBKD, out_sBHD, lse_BHs = ctx.saved_tensors
        call: _Call = ctx.call
        kv_S2BKD = call.region.gather_rows(torch.stack((k_sBKD, v_sBKD), 1))
        grad_q, grad_kv = call.backward(grad_sBHD, q_sBHD, kv_S2BKD, out_sBHD, lse_BHs, None)
        parts_ns2BKD = call.region.by_rank(grad_kv)
        own_s2BKD = torch.empty_like(parts_ns2BKD[0])
        call.region.group.reduce_scatter(own_s2BKD, parts_ns2BKD.flatten(0, 1)).wait()
        return grad_q, *own_s2BKD.unbind(1), None


class _Ring(Function):
    """Keys and values of rank r - t are at rank r in step t; their gradients follow them, and come home at the end."""

    spmd = "q_sBHD: V, k_sBKD: V, v_sBKD: V -> V"

    @staticmethod
    def forward(ctx: Any, q_sBHD: Tensor, k_sBKD: Tensor, v_sBKD: Tensor, call: _Call) -> Tensor:
        group, kv_s2BKD = call.region.group, torch.stack((k_sBKD, v_sBKD), 1)
        wide = torch.promote_types(q_sBHD.dtype, torch.float32)
        out_sBHD = lse_BHs = torch.empty(0)
        for step in range(group.size):
            arriving, work = _pass_on(kv_s2BKD, group) if step + 1 < group.size else (kv_s2BKD, None)
            one_sBHD, one_lse_BHs = call.forward(q_sBHD, kv_s2BKD, (group.index - step) % group.size)
            if step == 0:
                out_sBHD, lse_BHs = one_sBHD.to(wide), one_lse_BHs
            else:
                out_sBHD, lse_BHs = merge(out_sBHD, lse_BHs, one_sBHD.to(wide), one_lse_BHs)
            if work is not None:
                work.wait()
            kv_s2BKD = arriving
        out_sBHD = out_sBHD.to(q_sBHD.dtype)
        ctx.save_for_backward(q_sBHD, k_sBKD, v_sBKD, out_sBHD, lse_BHs)
        ctx.call = call
        return out_sBHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sBHD: Tensor) -> Any:
        q_sBHD, k_sBKD, v_sBKD, out_sBHD, lse_BHs = ctx.saved_tensors
        call: _Call = ctx.call
        group, kv_s2BKD = call.region.group, torch.stack((k_sBKD, v_sBKD), 1)
        wide = torch.promote_types(q_sBHD.dtype, torch.float32)
        grad_q_sBHD = torch.zeros_like(q_sBHD, dtype=wide)
        # The sums for keys and values travel in fp32: a rank's term may be far below the rounding of the others' sum.
        travelling, landed = None, None
        for step in range(group.size):
            arriving, work = _pass_on(kv_s2BKD, group) if step + 1 < group.size else (kv_s2BKD, None)
            source = (group.index - step) % group.size
            grad_q, grad_kv = call.backward(grad_sBHD, q_sBHD, kv_s2BKD, out_sBHD, lse_BHs, source)
            grad_q_sBHD += grad_q
            grad_kv = grad_kv.to(wide)
            if travelling is not None and landed is not None:
                landed.wait()
                grad_kv += travelling
            travelling, landed = _pass_on(grad_kv, group)
            if work is not None:
                work.wait()
            kv_s2BKD = arriving
        assert travelling is not None and landed is not None
        landed.wait()
        return grad_q_sBHD.to(q_sBHD.dtype), *travelling.to(k_sBKD.dtype).unbind(1), None


def _pass_on(tensor: Tensor, group: Group) -> tuple[Tensor, Any]:
    arriving = torch.empty_like(tensor)
    return arriving, group.pass_on(arriving, tensor)


def _merge_over_ranks(out_1BHD: Tensor, lse_BH1: Tensor, region: ContextRegion) -> Tensor:
    """The output over the keys of all ranks, the same bits on each; not differentiable."""
    wide = torch.promote_types(out_1BHD.dtype, torch.float32)
    outs_n1BHD, lses_nBH1 = (all_gather_stacked(x.to(wide), region.group) for x in (out_1BHD, lse_BH1))
    merged = outs_n1BHD[0], lses_nBH1[0]
    for other in zip(outs_n1BHD[1:], lses_nBH1[1:]):
        merged = merge(*merged, *other)
    return merged[0].to(out_1BHD.dtype)


class _HeadExchange:
    """Which heads go to which rank; made once for a number of query and kv heads."""

    def __init__(self, heads: int, kv_heads: int, region: ContextRegion, device: torch.device) -> None:
        splits = [split_heads(heads, kv_heads, region.size, index) for index in range(region.size)]
        self.region, self.own = region, splits[region.group.index]
        self.queries = (self.own.queries,) * region.size
        self.fused = tuple(split.queries + 2 * split.kvs for split in splits)
        order = [head for split in splits for head in _fused_heads(split, heads, kv_heads)]
        self.order = torch.tensor(order, device=device)
        self.kv_index = None if self.own.grouped else torch.tensor(self.own.kv_of_query, device=device)

    def __call__(
        self, q_sBHD: Tensor, k_sBKD: Tensor, v_sBKD: Tensor, attention: Callable[..., Tensor], **options: Any
    ) -> Tensor:
        """Rows for heads, `attention` of the whole sequence in any form, heads for rows."""
        own = self.own
        fused_sBED = torch.cat((q_sBHD, k_sBKD, v_sBKD), 2).index_select(2, self.order)
        fused_SBeD: Tensor = _Exchanged.apply(fused_sBED, _to_heads, _to_rows, self.fused, self.region)
        q_SBhD, k_SBkD, v_SBkD = fused_SBeD.split((own.queries, own.kvs, own.kvs), 2)
        if self.kv_index is not None:
            k_SBkD, v_SBkD = (x.index_select(2, self.kv_index) for x in (k_SBkD, v_SBkD))
        out_SBhD = attention(q_SBhD, k_SBkD, v_SBkD, **options)
        result: Tensor = _Exchanged.apply(out_SBhD, _to_rows, _to_heads, self.queries, self.region)
        return result


_Way = Callable[[Tensor, Sequence[int], ContextRegion], Tensor]


def _fused_heads(split: HeadSplit, heads: int, kv_heads: int) -> list[int]:
    """The heads of one rank among all queries, then keys, then values."""
    kvs = range(split.first_kv, split.first_kv + split.kvs)
    queries = range(split.first_query, split.first_query + split.queries)
    return [*queries, *(heads + kv for kv in kvs), *(heads + kv_heads + kv for kv in kvs)]


def _to_heads(x_sBED: Tensor, counts: Sequence[int], region: ContextRegion) -> Tensor:
    """All rows of this rank's heads, [S, B, e, D]; `counts` are the heads of each rank, in order along E."""
    own = counts[region.group.index]
    leaving_EsBD = x_sBED.permute(2, 0, 1, 3).contiguous()
    arriving_nesBD = leaving_EsBD.new_empty((region.size, own, *leaving_EsBD.shape[1:]))
    region.group.all_to_all(arriving_nesBD.flatten(0, 1), leaving_EsBD, [own] * region.size, counts).wait()
    return region.whole(arriving_nesBD.permute(0, 2, 3, 1, 4))


def _to_rows(x_SBeD: Tensor, counts: Sequence[int], region: ContextRegion) -> Tensor:
    """All heads of this rank's rows, [s, B, E, D]."""
    own = counts[region.group.index]
    leaving_nesBD = region.by_rank(x_SBeD).permute(0, 3, 1, 2, 4).contiguous()
    arriving_EsBD = leaving_nesBD.new_empty((sum(counts), *leaving_nesBD.shape[2:]))
    region.group.all_to_all(arriving_EsBD, leaving_nesBD.flatten(0, 1), counts, [own] * region.size).wait()
    return arriving_EsBD.permute(1, 2, 0, 3)


class _Exchanged(Function):
    """`there` of x, with `back` of the gradient: the two exchanges undo each other."""

    spmd = "x: V -> V"

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: _Way, back: _Way, counts: Sequence[int], region: ContextRegion) -> Tensor:
        ctx.back, ctx.way = back, (counts, region)
        return there(x, counts, region)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad, *ctx.way), None, None, None, None
