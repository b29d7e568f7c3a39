"""Attention by torch's fused operator.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .reference import Options, attention_reference, mask_of, read_options


def fusable(q_SBHD: Tensor, k_SBKD: Tensor, options: Options) -> bool:
    """Whether torch's fused operators support a call: no softcap, no log-sum-exp, and a visible key for every query."""
    queries, keys = len(q_SBHD), len(k_SBKD)
    return options.softcap is None and not options.return_lse and not (options.causal and queries > keys)


def plain_mask(q_SBHD: Tensor, k_SBKD: Tensor, options: Options) -> bool:
    """Whether the operator's own mask suffices: causal with as many keys as queries, or none."""
    queries, keys = len(q_SBHD), len(k_SBKD)
    wide = options.window is None or options.window >= keys
    return options.documents is None and wide and (queries == keys or not options.causal)


def attention_sdpa(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_reference` through `torch.nn.functional.scaled_dot_product_attention`, on every device.

    Calls that the fused operators cannot do (`fusable`) use the reference.
    """
    asked = read_options(q_SBHD, k_SBKD, v_SBKD, options)
    if not fusable(q_SBHD, k_SBKD, asked):
        return attention_reference(q_SBHD, k_SBKD, v_SBKD, **asked._asdict())
    if len(q_SBHD) == 1:
        return _one_query(q_SBHD, k_SBKD, v_SBKD, asked)
    # `is_causal` only where torch's meaning equals ours: torch aligns the diagonal at the first key, we at the last,
    # and torch refuses it together with a mask. A mask costs memory and rules out FlashAttention, so none is made for a
    # window as long as the keys. enable_gqa avoids copying keys and values to one head per query head.
    plain = plain_mask(q_SBHD, k_SBKD, asked)
    mask = None if plain else mask_of(q_SBHD, k_SBKD, asked)
    q_BHSD, k_BKTD, v_BKTD = (x.permute(1, 2, 0, 3) for x in (q_SBHD, k_SBKD, v_SBKD))
    grouped = q_BHSD.shape[1] != k_BKTD.shape[1]
    out_BHSD = F.scaled_dot_product_attention(
        q_BHSD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=asked.causal and plain, scale=asked.scale, enable_gqa=grouped
    )
    return out_BHSD.permute(2, 0, 1, 3)


def _one_query(q_1BHD: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, options: Options) -> Tensor:
    """The newest token's attention, for generation: no mask but for documents, and each key is read once.

    The query heads that share a kv head stand as if they were several queries of one head; a window is a slice.
    """
    (_, batch, heads, _), (keys, _, kv_heads, _) = q_1BHD.shape, k_TBKD.shape
    mask = None
    if options.documents is not None:
        mask = mask_of(q_1BHD, k_TBKD, options._replace(causal=False, window=None))
    if options.window is not None and options.window < keys:
        k_TBKD, v_TBKD = k_TBKD[-options.window :], v_TBKD[-options.window :]
        mask = None if mask is None else mask[..., -options.window :]
    q_BKGD = q_1BHD.reshape(batch, kv_heads, heads // kv_heads, -1)
    k_BKTD, v_BKTD = (x.permute(1, 2, 0, 3) for x in (k_TBKD, v_TBKD))
    out_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKTD, v_BKTD, attn_mask=mask, scale=options.scale)
    return out_BKGD.reshape(1, batch, heads, -1)
