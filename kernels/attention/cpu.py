"""Attention on CPUs: the form that was measured fastest for a kind of call, by a fixed rule.

Shapes: S queries, T keys, B batch, H query heads, K kv heads, D head dim, G = H / K query heads of one kv head.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native
from .blocked import attention_blocked
from .reference import Options, document_begins, grouped, mask_of, merge_heads, read_options
from .sdpa import attention_sdpa, fusable, plain_mask

COMPILED_WIDEST = 32  # heads for which our compiled attention is the fastest in bf16 beside AMX units
EXPLICIT_WIDTH = 128  # heads from which two bf16 products beat the fused operator ...
EXPLICIT_LONGEST = 512  # ... up to so many keys


def form(
    dtype: torch.dtype,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    width: int,
    *,
    causal: bool,
    trains: bool,
    compiled: bool,
    matrix_units: bool,
) -> str:
    """`native`, `explicit`, `blocked` or `sdpa`, for a call that all of them can do.

    `compiled`: the compiled kernels are there; `matrix_units`: the CPU multiplies bf16 in such (AMX).

    A rule, not a race at the first call, so that every run has the same bits. Measured on two cores with AVX-512 and
    AMX, with AVX2 too. fp32 has the compiled form. In bf16 that is the fastest where there are no matrix units or the
    heads are too narrow for them; with them, wide heads and few keys make two plain products best, and training is
    best with the backward in blocks, until the sums over blocks of queries cost more than its products win.
    """
    whole = causal and queries == keys
    if whole and compiled:
        if dtype == torch.float32:
            return "native"
        if dtype == torch.bfloat16 and (width <= COMPILED_WIDEST or not matrix_units):
            return "native"
    if dtype != torch.bfloat16:
        return "sdpa"
    if width >= EXPLICIT_WIDTH and keys <= EXPLICIT_LONGEST:
        return "explicit"
    return "blocked" if whole and trains and keys <= EXPLICIT_LONGEST * (heads // kv_heads) else "sdpa"


def attention_cpu(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_reference` in the fastest form for a CPU; calls that only the reference does are written out."""
    asked = read_options(q_SBHD, k_SBKD, v_SBKD, options)
    if q_SBHD.device.type != "cpu" or len(q_SBHD) == 1 or not fusable(q_SBHD, k_SBKD, asked):
        return attention_sdpa(q_SBHD, k_SBKD, v_SBKD, **asked._asdict())
    (queries, _, heads, width), (keys, _, kv_heads, _) = q_SBHD.shape, k_SBKD.shape
    chosen = form(
        q_SBHD.dtype,
        *(queries, keys, heads, kv_heads, width),
        causal=asked.causal,
        trains=torch.is_grad_enabled(),
        compiled=native.obstacle() is None,
        matrix_units=torch.cpu._is_amx_tile_supported(),
    )
    scale = asked.scale_for(q_SBHD)
    if chosen == "native":
        return native.attention(q_SBHD, k_SBKD, v_SBKD, first_keys(queries, asked), scale)
    if chosen == "explicit":
        return _explicit(q_SBHD, k_SBKD, v_SBKD, mask_of(q_SBHD, k_SBKD, asked), scale)
    if chosen == "blocked":
        if plain_mask(q_SBHD, k_SBKD, asked):
            return attention_blocked(q_SBHD, k_SBKD, v_SBKD, scale=scale, window=None, mask=None)
        mask = mask_of(q_SBHD, k_SBKD, asked)
        return attention_blocked(q_SBHD, k_SBKD, v_SBKD, scale=scale, window=asked.window, mask=mask)
    return attention_sdpa(q_SBHD, k_SBKD, v_SBKD, **asked._asdict())


def first_keys(length: int, options: Options) -> Tensor | None:
    """The first key that each of as many queries as keys sees, int64 [1 or B, S]; None: the very first."""
    documents, window = options.packed, options.window
    if documents is None and window is None:
        return None

    def make(numbers_TB: Tensor | None) -> Tensor:
        none_1S = torch.zeros(1, length, dtype=torch.int64)
        first_BS = none_1S if numbers_TB is None else document_begins(numbers_TB).t()
        return first_BS if window is None else torch.maximum(first_BS, torch.arange(length) - (window - 1))

    return make(None) if documents is None else documents.once(("first", length, window), make)


def _explicit(q_SBHD: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Products in the inputs' dtype, softmax in fp32; every query must see a key."""
    q_BKGSD, k_BK1TD, v_BK1TD = grouped(q_SBHD * scale, k_SBKD, v_SBKD)
    batch, kv_heads, group, queries, width = q_BKGSD.shape
    # The G heads of a group are one tall product with their kv head: no copy of k or v is made.
    q_BKXD = q_BKGSD.reshape(batch, kv_heads, group * queries, width)
    scores_BKGST = (q_BKXD @ k_BK1TD.squeeze(2).transpose(-1, -2)).view(batch, kv_heads, group, queries, -1)
    if mask is not None:
        mask = mask.unsqueeze(2) if mask.dim() == 4 else mask
        scores_BKGST = scores_BKGST.masked_fill(~mask, -torch.inf)
    p_BKGST = scores_BKGST.softmax(-1)
    out_BKXD = p_BKGST.view(batch, kv_heads, group * queries, -1) @ v_BK1TD.squeeze(2)
    return merge_heads(out_BKXD.view(batch, kv_heads, group, queries, width))
