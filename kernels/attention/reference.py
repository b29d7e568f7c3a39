"""Attention written out: which keys a query sees, what every form is called with, and the explicit specification.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim, G = H / K query heads of one kv head.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


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


class Options(NamedTuple):
    """What a call of attention may ask for besides its tensors."""

    causal: bool = True
    window: int | None = None
    """Keys visible to a query, itself included."""
    scale: float | None = None
    """Of the scores; D^-1/2 where not given."""
    documents: Tensor | Documents | None = None
    """The document of every key, int [T, B] (needs S <= T), as `Documents` where several calls share it."""
    softcap: float | None = None
    """Bound of the scores before the mask."""
    return_lse: bool = False
    """Return the natural log-sum-exp of the scores, too: fp32 [B, H, S]."""

    @property
    def packed(self) -> Documents | None:
        return Documents(self.documents) if isinstance(self.documents, Tensor) else self.documents

    def scale_for(self, q_SBHD: Tensor) -> float:
        return float(q_SBHD.shape[-1] ** -0.5) if self.scale is None else self.scale


def read_options(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, options: dict[str, Any]) -> Options:
    """A call's options, `documents` as `Documents`; every form of attention begins with it.

    Raises ValueError if shapes or dtypes do not fit together.
    """
    asked = Options(**options)
    documents = asked.packed
    shapes = f"q {tuple(q_SBHD.shape)}, k {tuple(k_SBKD.shape)}, v {tuple(v_SBKD.shape)}"
    if q_SBHD.dim() != 4 or k_SBKD.dim() != 4 or k_SBKD.shape[:3] != v_SBKD.shape[:3] or v_SBKD.dim() != 4:
        raise ValueError(f"q must be [S, B, H, D], k [T, B, K, D], v [T, B, K, V], not {shapes}")
    (queries, batch, heads, width), (keys, kv_batch, kv_heads, kv_width) = q_SBHD.shape, k_SBKD.shape
    if batch != kv_batch or width != kv_width or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"batch and head dim must be equal, and query heads a multiple of kv heads, not {shapes}")
    if not q_SBHD.dtype == k_SBKD.dtype == v_SBKD.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q_SBHD.dtype}, {k_SBKD.dtype}, {v_SBKD.dtype}")
    if documents is not None and (documents.numbers_TB.shape != (keys, batch) or queries > keys):
        raise ValueError(f"documents must be [T, B] with S <= T, not {tuple(documents.numbers_TB.shape)} for {shapes}")
    return asked._replace(documents=documents)


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


def mask_of(q_SBHD: Tensor, k_SBKD: Tensor, options: Options) -> Tensor | None:
    """`visible_keys` of a call; with documents it is made once for all calls that share them."""
    queries, keys, documents = len(q_SBHD), len(k_SBKD), options.packed
    causal, window = options.causal, options.window

    def make(numbers_TB: Tensor | None) -> Tensor | None:
        return visible_keys(queries, keys, causal=causal, window=window, documents=numbers_TB, device=q_SBHD.device)

    return make(None) if documents is None else documents.once(("mask", queries, keys, causal, window), make)


def attention_reference(
    q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention computed in fp32 (float64 for float64) with O(S T) memory: the formula of the package, differentiable.

    q_SBHD [S, B, H, D]; k_SBKD [T, B, K, D] and v_SBKD [T, B, K, V], H a multiple of K, any strides; `Options` by name.
    Returns the output [S, B, H, V] in q's dtype, and with `return_lse` also the log-sum-exp. Raises ValueError for
    shapes that do not fit.
    """
    asked = read_options(q_SBHD, k_SBKD, v_SBKD, options)
    wide = torch.promote_types(q_SBHD.dtype, torch.float32)
    q_BKGSD, k_BK1TD, v_BK1TD = (x.to(wide) for x in grouped(q_SBHD, k_SBKD, v_SBKD))
    scores_BKGST = q_BKGSD @ k_BK1TD.transpose(-1, -2) * asked.scale_for(q_SBHD)
    if asked.softcap is not None:
        scores_BKGST = asked.softcap * torch.tanh(scores_BKGST / asked.softcap)
    mask = mask_of(q_SBHD, k_SBKD, asked)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
        scores_BKGST = scores_BKGST.masked_fill(~mask, -torch.inf)
    max_BKGS1 = scores_BKGST.detach().amax(-1, keepdim=True)
    max_BKGS1 = max_BKGS1.where(max_BKGS1 > -torch.inf, 0)
    p_BKGST = (scores_BKGST - max_BKGS1).exp()
    sum_BKGS1 = p_BKGST.sum(-1, keepdim=True)
    seen = sum_BKGS1 > 0
    sum_BKGS1 = sum_BKGS1.where(seen, 1)
    out_SBHD = merge_heads((p_BKGST @ v_BK1TD) / sum_BKGS1).to(q_SBHD.dtype)
    if not asked.return_lse:
        return out_SBHD
    lse_BKGS = (sum_BKGS1.log() + max_BKGS1).where(seen, -torch.inf).squeeze(-1)
    return out_SBHD, lse_BKGS.flatten(1, 2)


def grouped(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k_SBKD.shape[2]
    q_BKGSD = q_SBHD.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4)
    k_BK1TD, v_BK1TD = (x.permute(1, 2, 0, 3).unsqueeze(2) for x in (k_SBKD, v_SBKD))
    return q_BKGSD, k_BK1TD, v_BK1TD


def merge_heads(x_BKGSD: Tensor) -> Tensor:
    return x_BKGSD.permute(3, 0, 1, 2, 4).flatten(2, 3)
