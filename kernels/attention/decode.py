"""Attention of one query a row to a buffer that is filled from the front, by a count that only the device knows.

It is what generation asks for every token, in a form whose shapes and numbers never change: what a CUDA graph needs
(`megalite.generation.token_graph`). Row b sees the places [max(first_b, count - window), count) of the buffer:

    out_b = sum_j softmax_j(softcap(scale q_b . k_bj)) v_bj       softcap as in the package; 0 where nothing is seen

Whatever the buffer holds elsewhere, NaN included, changes nothing. The Triton form is in `decode_triton.py`.

Shapes: C places, B rows, H query heads, K kv heads, D head dim, V that of values, G = H / K.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Filled(NamedTuple):
    """Which places of a buffer hold something: those of row b from `first_B[b]` on, up to a count that all share."""

    first_B: Tensor
    """int64 [B]."""
    count_1: Tensor
    """int64 [1]; the query is that of the last place filled."""


def check(q_1BHD: Tensor, k_CBKD: Tensor, v_CBKV: Tensor, filled: Filled) -> None:
    """Raise ValueError if shapes or dtypes do not fit together; both forms call it first."""
    (queries, batch, heads, width), kv_heads = q_1BHD.shape, k_CBKD.shape[2]
    if queries != 1 or k_CBKD.shape[1:] != (batch, kv_heads, width) or k_CBKD.shape[:3] != v_CBKV.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_1BHD, k_CBKD, v_CBKV))
        raise ValueError(f"q must be [1, B, H, D], k [C, B, K, D], v [C, B, K, V], not {shapes}")
    if heads % kv_heads or not q_1BHD.dtype == k_CBKD.dtype == v_CBKV.dtype:
        raise ValueError(f"{heads} query heads must be a multiple of {kv_heads} kv heads, and all of one dtype")
    if filled.first_B.shape != (batch,) or filled.count_1.shape != (1,):
        shapes = f"{tuple(filled.first_B.shape)} and {tuple(filled.count_1.shape)}"
        raise ValueError(f"first places must be [{batch}] and their count [1], not {shapes}")


def decode_attention(
    q_1BHD: Tensor,
    k_CBKD: Tensor,
    v_CBKV: Tensor,
    filled: Filled,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The formula above in fp32 (float64 for float64), [1, B, H, V] in q's dtype; any strides, no gradients."""
    check(q_1BHD, k_CBKD, v_CBKV, filled)
    wide = torch.promote_types(q_1BHD.dtype, torch.float32)
    place_C = torch.arange(len(k_CBKD), device=q_1BHD.device)
    first_B = filled.first_B if window is None else torch.maximum(filled.first_B, filled.count_1 - window)
    hidden_B1C = ((place_C < first_B[:, None]) | (place_C >= filled.count_1))[:, None]
    q_BKGD = q_1BHD.squeeze(0).unflatten(1, (k_CBKD.shape[2], -1)).to(wide)
    k_BKCD, v_BKCV = (x.permute(1, 2, 0, 3).to(wide) for x in (k_CBKD, v_CBKV))
    scores_BKGC = q_BKGD @ k_BKCD.transpose(-1, -2) * (q_1BHD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_BKGC = softcap * torch.tanh(scores_BKGC / softcap)
    hidden_B11C = hidden_B1C[:, None]
    p_BKGC = scores_BKGC.masked_fill(hidden_B11C, -torch.inf).softmax(-1).masked_fill(hidden_B11C, 0)
    out_BKGV = p_BKGC @ v_BKCV.masked_fill(hidden_B1C[..., None], 0)  # 0 times NaN would be NaN
    return out_BKGV.flatten(1, 2).unsqueeze(0).to(q_1BHD.dtype)
