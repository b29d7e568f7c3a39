"""Softmax attention for training: which keys a query sees, the explicit specification, and torch's fused operators.

Query i of S queries, key j of T keys (aligned at the end, "bottom right": query i stands at key position i + T - S):

    visible(i, j) = (j <= i + T - S  if causal) and (i + T - S - window < j  if window) and (documents equal)
    out_i = sum_j softmax_j(softcap(scale q_i . k_j)) v_j         softcap(x) = c tanh(x / c), or x where there is none

A query that sees no key gives 0, and log-sum-exp -inf. Query head h reads kv head h // (H / K). The Triton form with
the same signature (Dao et al. 2022 and Dao 2023, "FlashAttention" 1 and 2) is in `flash_attention_triton.py`.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim, G = H / K query heads of one kv head.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .blocked_attention import attention_blocked

Made = TypeVar("Made")

COMPILED_WIDEST = 32  # heads for which our compiled attention is the fastest in bf16 beside AMX units
EXPLICIT_WIDTH = 128  # heads from which two bf16 products beat the fused operator on a CPU
EXPLICIT_LONGEST = 512  # keys; above it the explicit bf16 form loses to the fused operator on a CPU


class Documents:
    """The documents of a micro-batch's keys, int [T, B] in runs of equal numbers, and what masks need of them.

    A mask or a table of bounds is made at the first call that asks for it, and kept: the layers of a micro-batch, and
    their recomputation in backward, share it.
    """

    def __init__(self, numbers_TB: Tensor) -> None:
        self.numbers_TB = numbers_TB
        self._made: dict[Hashable, object] = {}

    def once(self, what: Hashable, make: Callable[[Tensor], Made]) -> Made:
        """`make(numbers_TB)`, or what it gave when `what` was first asked for."""
        if what not in self._made:
            self._made[what] = make(self.numbers_TB)
        return self._made[what]  # type: ignore[return-value]


def as_documents(documents: "Tensor | Documents | None") -> Documents | None:
    return Documents(documents) if isinstance(documents, Tensor) else documents


def check(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, documents: Documents | None) -> None:
    """Raise ValueError where the shapes or dtypes do not fit together; every form of attention begins with it."""
    shapes = f"q {tuple(q_SBHD.shape)}, k {tuple(k_SBKD.shape)}, v {tuple(v_SBKD.shape)}"
    if q_SBHD.dim() != 4 or k_SBKD.dim() != 4 or k_SBKD.shape != v_SBKD.shape:
        raise ValueError(f"q must be [S, B, H, D], k and v alike [T, B, K, D], not {shapes}")
    (queries, batch, heads, width), (keys, kv_batch, kv_heads, kv_width) = q_SBHD.shape, k_SBKD.shape
    if batch != kv_batch or width != kv_width or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"batch and head dim must be equal, and query heads a multiple of kv heads, not {shapes}")
    if not q_SBHD.dtype == k_SBKD.dtype == v_SBKD.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q_SBHD.dtype}, {k_SBKD.dtype}, {v_SBKD.dtype}")
    if documents is not None and (documents.numbers_TB.shape != (keys, batch) or queries > keys):
        raise ValueError(f"documents must be [T, B] with S <= T, not {tuple(documents.numbers_TB.shape)} for {shapes}")


def visible_keys(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    documents: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Boolean mask [S, T], or [B, 1, S, T] with documents; None where every query sees every key."""
    if not causal and window is None and documents is None:
        return None
    i = torch.arange(queries, device=device)[:, None] + (keys - queries)
    j = torch.arange(keys, device=device)[None, :]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        mask &= j <= i
    if window is not None:
        mask &= j > i - window
    if documents is None:
        return mask
    begin_BT = document_begins(documents).t()
    return (mask & (begin_BT[:, keys - queries :, None] == begin_BT[:, None, :]))[:, None]


def document_begins(numbers_TB: Tensor) -> Tensor:
    """The first key of every key's document, int64 [T, B], for documents in runs of equal numbers."""
    begin_TB = torch.arange(len(numbers_TB), device=numbers_TB.device)[:, None].repeat(1, numbers_TB.shape[1])
    begin_TB[1:].masked_fill_(numbers_TB[1:] == numbers_TB[:-1], 0)
    return begin_TB.cummax(0).values


def attention_reference(
    q_SBHD: Tensor,
    k_SBKD: Tensor,
    v_SBKD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    documents: Tensor | Documents | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention written out, computed in fp32 (float64 for float64), O(S T) memory; see the top of the file.

    q_SBHD [S, B, H, D]; k_SBKD and v_SBKD [T, B, K, D], H a multiple of K, any strides; window: keys visible to a
    query, itself included; scale: D^-1/2 where not given; documents: int [T, B], the document of every key (needs S <=
    T; the queries are the last S positions), as `Documents` where several calls share it; softcap: bound of the scores
    before the mask. Returns out_SBHD in q's dtype, and with `return_lse` also the natural log-sum-exp of the scores,
    fp32 [B, H, S]. Both are differentiable. Raises ValueError for shapes that do not fit together.
    """
    documents = as_documents(documents)
    check(q_SBHD, k_SBKD, v_SBKD, documents)
    wide = torch.promote_types(q_SBHD.dtype, torch.float32)
    q_BKGSD, k_BK1TD, v_BK1TD = (x.to(wide) for x in _grouped(q_SBHD, k_SBKD, v_SBKD))
    scores_BKGST = q_BKGSD @ k_BK1TD.transpose(-1, -2) * _scale(scale, q_SBHD)
    if softcap is not None:
        scores_BKGST = softcap * torch.tanh(scores_BKGST / softcap)
    mask = _mask(q_SBHD, k_SBKD, causal, window, documents)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
        scores_BKGST = scores_BKGST.masked_fill(~mask, -torch.inf)
    max_BKGS1 = scores_BKGST.detach().amax(-1, keepdim=True)
    max_BKGS1 = max_BKGS1.where(max_BKGS1 > -torch.inf, 0)
    p_BKGST = (scores_BKGST - max_BKGS1).exp()
    sum_BKGS1 = p_BKGST.sum(-1, keepdim=True)
    seen = sum_BKGS1 > 0
    sum_BKGS1 = sum_BKGS1.where(seen, 1)
    out_SBHD = _merge_heads((p_BKGST @ v_BK1TD) / sum_BKGS1).to(q_SBHD.dtype)
    if not return_lse:
        return out_SBHD
    lse_BKGS = (sum_BKGS1.log() + max_BKGS1).where(seen, -torch.inf).squeeze(-1)
    return out_SBHD, lse_BKGS.flatten(1, 2)


def attention_sdpa(
    q_SBHD: Tensor,
    k_SBKD: Tensor,
    v_SBKD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    documents: Tensor | Documents | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_reference` through `torch.nn.functional.scaled_dot_product_attention`, or the fastest equal form on a
    CPU.

    Soft-capped scores, the log-sum-exp and queries that see no key (more causal queries than keys) are not among what
    the fused operators do: the explicit form takes those calls.
    """
    documents = as_documents(documents)
    check(q_SBHD, k_SBKD, v_SBKD, documents)
    queries, keys = q_SBHD.shape[0], k_SBKD.shape[0]
    if not fusable(queries, keys, causal, softcap, return_lse):
        return attention_reference(
            q_SBHD,
            k_SBKD,
            v_SBKD,
            causal=causal,
            window=window,
            scale=scale,
            documents=documents,
            softcap=softcap,
            return_lse=return_lse,
        )
    if _compiled_is_faster(q_SBHD, keys, causal):
        first_BS = _first_keys(queries, window, documents)
        return native.attention(q_SBHD, k_SBKD, v_SBKD, first_BS, _scale(scale, q_SBHD))
    if _explicit_is_faster(q_SBHD, keys):
        mask = _mask(q_SBHD, k_SBKD, causal, window, documents)
        return _explicit_narrow(q_SBHD, k_SBKD, v_SBKD, mask, _scale(scale, q_SBHD))
    plain = documents is None and (window is None or window >= keys) and (queries == keys or not causal)
    mask = None if plain else _mask(q_SBHD, k_SBKD, causal, window, documents)
    if _blocked_is_faster(q_SBHD, k_SBKD, causal):
        return attention_blocked(
            q_SBHD, k_SBKD, v_SBKD, scale=_scale(scale, q_SBHD), window=None if plain else window, mask=mask
        )
    q_BHSD, k_BKTD, v_BKTD = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBKD, v_SBKD))
    grouped = q_BHSD.shape[1] != k_BKTD.shape[1]
    out_BHSD = F.scaled_dot_product_attention(
        q_BHSD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=causal and plain, scale=scale, enable_gqa=grouped
    )
    return out_BHSD.permute(2, 0, 1, 3)


def fusable(queries: int, keys: int, causal: bool, softcap: float | None, return_lse: bool) -> bool:
    """Whether torch's fused operators do such a call; they cap no scores, return no sums, and want a key for all."""
    return softcap is None and not return_lse and not (causal and queries > keys)


def _compiled_is_faster(q_SBHD: Tensor, keys: int, causal: bool) -> bool:
    """Of the forms for a CPU ours for training and validation, but in bf16 where matrix units have wide heads to do.

    Measured on two cores with AVX-512 and AMX, with AVX2 too; a fixed rule, as `_blocked_is_faster`.
    """
    if q_SBHD.device.type != "cpu" or not causal or keys != q_SBHD.shape[0] or native.obstacle() is not None:
        return False
    if q_SBHD.dtype == torch.bfloat16:
        return q_SBHD.shape[-1] <= COMPILED_WIDEST or not torch.cpu._is_amx_tile_supported()
    return q_SBHD.dtype == torch.float32


def _first_keys(length: int, window: int | None, documents: Documents | None) -> Tensor | None:
    """The first key that each of as many queries as keys sees, int64 [1 or B, S]; None: the very first."""
    if documents is None and window is None:
        return None

    def make(numbers_TB: Tensor | None) -> Tensor:
        none_1S = torch.zeros(1, length, dtype=torch.int64)
        first_BS = none_1S if numbers_TB is None else document_begins(numbers_TB).t()
        return first_BS if window is None else torch.maximum(first_BS, torch.arange(length) - (window - 1))

    return make(None) if documents is None else documents.once(("first", length, window), make)


def _explicit_is_faster(q_SBHD: Tensor, keys: int) -> bool:
    """A CPU's matrix units make two bf16 products faster than the fused operator for wide heads and short keys."""
    narrow = q_SBHD.dtype == torch.bfloat16 and q_SBHD.device.type == "cpu"
    return narrow and q_SBHD.shape[-1] >= EXPLICIT_WIDTH and keys <= EXPLICIT_LONGEST


def _blocked_is_faster(q_SBHD: Tensor, k_SBKD: Tensor, causal: bool) -> bool:
    """For training in bf16 on a CPU, until the sums over blocks of queries cost more than the products win.

    Measured on two cores with AMX; fixed rules, not a race at the first call, so that every run has the same bits.
    """
    narrow = q_SBHD.dtype == torch.bfloat16 and q_SBHD.device.type == "cpu" and torch.is_grad_enabled()
    (queries, _, heads, _), (keys, _, kv_heads, _) = q_SBHD.shape, k_SBKD.shape
    return narrow and causal and queries == keys and keys <= EXPLICIT_LONGEST * (heads // kv_heads)


def _explicit_narrow(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Products in the inputs' dtype, softmax in fp32; every query must see a key."""
    q_BKGSD, k_BK1TD, v_BK1TD = _grouped(q_SBHD * scale, k_SBKD, v_SBKD)
    batch, kv_heads, group, queries, width = q_BKGSD.shape
    # The G heads of a group are one tall product with their kv head: no copy of k or v is made.
    q_BKXD = q_BKGSD.reshape(batch, kv_heads, group * queries, width)
    scores_BKGST = (q_BKXD @ k_BK1TD.squeeze(2).transpose(-1, -2)).view(batch, kv_heads, group, queries, -1)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
        scores_BKGST = scores_BKGST.masked_fill(~mask, -torch.inf)
    p_BKGST = scores_BKGST.softmax(-1)
    out_BKXD = p_BKGST.view(batch, kv_heads, group * queries, -1) @ v_BK1TD.squeeze(2)
    return _merge_heads(out_BKXD.view(batch, kv_heads, group, queries, width))


def _scale(scale: float | None, q_SBHD: Tensor) -> float:
    return float(q_SBHD.shape[-1] ** -0.5) if scale is None else scale


def _mask(
    q_SBHD: Tensor, k_SBKD: Tensor, causal: bool, window: int | None, documents: Documents | None
) -> Tensor | None:
    queries, keys = q_SBHD.shape[0], k_SBKD.shape[0]

    def make(numbers_TB: Tensor | None) -> Tensor | None:
        return visible_keys(queries, keys, causal=causal, window=window, documents=numbers_TB, device=q_SBHD.device)

    return make(None) if documents is None else documents.once(("mask", queries, keys, causal, window), make)


def _grouped(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k_SBKD.shape[2]
    q_BKGSD = q_SBHD.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4)
    k_BK1TD, v_BK1TD = (x.permute(1, 2, 0, 3).unsqueeze(2) for x in (k_SBKD, v_SBKD))
    return q_BKGSD, k_BK1TD, v_BK1TD


def _merge_heads(x_BKGSD: Tensor) -> Tensor:
    return x_BKGSD.permute(3, 0, 1, 2, 4).flatten(2, 3)


attention = attention_reference
