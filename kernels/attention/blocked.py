"""Training attention in bf16 on a CPU: torch's fused forward, and a backward of a few large products per tile.

Torch's fused CPU operator multiplies small pieces in its backward and reaches a fraction of what the processor's matrix
units can do. Here a tile is a block of queries of a few heads against all keys that they may see; it is as large as
the second-level cache takes, so that only the products leave it. Blocks of keys in the future are never touched. The
probabilities are made again (Dao et al. 2022, "FlashAttention", section 3.1): nothing of size S T is kept.

Shapes: S queries and keys, B batch, H query heads, K kv heads, D head dim, G = H / K query heads of one kv head,
N = B K; in a tile n of the N, R = G times the block's queries, t the keys up to the block's end.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ROWS = 256  # queries of all heads in a group: fewer skip more of the future, more make better products
TILE_ELEMENTS = 1 << 19  # scores of a tile: 1 MB


class Tile(NamedTuple):
    """One unit of work: which of the N heads, which queries, and the keys that any of them may see."""

    heads: slice
    rows: slice
    keys: slice


def attention_blocked(
    q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, *, scale: float, window: int | None, mask: Tensor | None
) -> Tensor:
    """Causal attention out_SBHD, as `attention_reference`; S queries and S keys.

    mask, bool [S, S] or [B, 1, S, S] and true where a query sees a key (`visible_keys`), None if the call is causal
    and no more; window: where the mask has one, so that blocks of keys that no query sees are left out.
    """
    result: Tensor = _Blocked.apply(q_SBHD, k_SBKD, v_SBKD, scale, window, mask)
    return result


def _tiles(heads: int, group: int, length: int, window: int | None) -> Iterator[Tile]:
    block = max(TILE_ROWS // group, 32)
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        keys = slice(max(0, start - window + 1) if window else 0, rows.stop)
        step = max(1, TILE_ELEMENTS // (group * (rows.stop - start) * (keys.stop - keys.start)))
        for head in range(0, heads, step):
            yield Tile(slice(head, min(head + step, heads)), rows, keys)


def _by_head(x_SBND: Tensor, kv_heads: int) -> Tensor:
    """[S, B, H or K, D] -> contiguous [N, G or 1, S, D]."""
    return x_SBND.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4).flatten(0, 1).contiguous()


def _by_place(x_NGSD: Tensor, batch: int) -> Tensor:
    """The way back, as a view."""
    return x_NGSD.unflatten(0, (batch, -1)).permute(3, 0, 1, 2, 4).flatten(2, 3)


def _penalty(tile: Tile, mask: Tensor | None, group: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, slice]:
    """What is added to a tile's scores, -inf where a query does not see a key, and the tile's keys that it is for."""
    if mask is None:  # all keys before the block are seen by all of its queries
        size = tile.rows.stop - tile.rows.start
        hidden = torch.ones(size, size, dtype=torch.bool).triu_(1)
        keys = slice(tile.rows.start - tile.keys.start, None)
    else:
        places = torch.arange(tile.heads.start, tile.heads.stop) // kv_heads
        hidden = ~(mask[places, 0, tile.rows, tile.keys] if mask.dim() == 4 else mask[tile.rows, tile.keys])
        keys = slice(None)
    penalty = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return torch.cat([penalty] * group, dim=-2), keys


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_SBHD: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        scale: float,
        window: int | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q_SBHD, k_SBKD, v_SBKD, mask)
        ctx.plan = (scale, window)
        q_BHSD, k_BKSD, v_BKSD = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBKD, v_SBKD))
        out_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return out_BHSD.permute(2, 0, 1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBHD: Tensor) -> Any:
        q_SBHD, k_SBKD, v_SBKD, mask = ctx.saved_tensors
        scale, window = ctx.plan
        batch, kv_heads, dtype = q_SBHD.shape[1], k_SBKD.shape[2], q_SBHD.dtype
        q_NGSD, grad_NGSD = _by_head(q_SBHD * scale, kv_heads), _by_head(grad_SBHD, kv_heads)
        k_NSD, v_NSD = (_by_head(x, kv_heads).squeeze(1) for x in (k_SBKD, v_SBKD))
        heads, group, length, width = q_NGSD.shape
        grad_q_NGSD = torch.empty_like(q_NGSD)
        # Sums over blocks of queries are fp32, and have the keys last: the products' long side is then contiguous.
        wide = torch.promote_types(dtype, torch.float32)
        grad_k_NDS, grad_v_NDS = (torch.zeros((heads, width, length), dtype=wide) for _ in range(2))
        rows = None
        for tile in _tiles(heads, group, length, window):
            if rows != tile.rows or (mask is not None and mask.dim() == 4):
                rows = tile.rows
                penalty, hidden = _penalty(tile, mask, group, kv_heads, dtype)
            q_nRD, grad_nRD = (x[tile.heads, :, tile.rows].flatten(1, 2) for x in (q_NGSD, grad_NGSD))
            k_ntD, v_ntD = k_NSD[tile.heads, tile.keys], v_NSD[tile.heads, tile.keys]
            scores_nRt = torch.bmm(q_nRD, k_ntD.mT)
            scores_nRt[..., hidden].add_(penalty)
            p_nRt = torch.softmax(scores_nRt, -1)
            grad_v_NDS[tile.heads, :, tile.keys].add_(torch.bmm(grad_nRD.mT.contiguous(), p_nRt))
            grad_p_nRt = torch.bmm(grad_nRD, v_ntD.mT, out=scores_nRt)
            grad_s_nRt = torch._softmax_backward_data(grad_p_nRt, p_nRt, -1, dtype)
            grad_k_NDS[tile.heads, :, tile.keys].add_(torch.bmm(q_nRD.mT.contiguous(), grad_s_nRt))
            grad_q_NGSD[tile.heads, :, tile.rows] = torch.bmm(grad_s_nRt, k_ntD).unflatten(1, (group, -1))
        grad_q_SBHD = _by_place(grad_q_NGSD.mul_(scale), batch)
        grad_k_SBKD, grad_v_SBKD = (_by_place(x.mT.unsqueeze(1), batch).to(dtype) for x in (grad_k_NDS, grad_v_NDS))
        return grad_q_SBHD, grad_k_SBKD, grad_v_SBKD, None, None, None
