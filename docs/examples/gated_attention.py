"""Attention with an output gate: what the heads found is multiplied by sigmoid(gate(x)) before the last projection.

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden; E this rank's query heads times their
width. Source: Qiu et al. 2025, Gated Attention for Large Language Models (arXiv:2505.06708), gate G1, element-wise.

    [model]
    attention = "gated_attention:GatedAttention"
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalite.model.attention import GroupedQueryAttention, KeyValueCache, Positions
from megalite.model.build import Build
from megalite.placement import row_box


def gated(mixed_SBE: Tensor, gate_SBE: Tensor) -> Tensor:
    return mixed_SBE * torch.sigmoid(gate_SBE)


class GatedAttention(GroupedQueryAttention):
    """norm'd hidden [s, B, H] -> attention output [s, B, H]."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__(build, layer)
        model, dim = build.model, build.model.head_dim
        # A rank holds the gates of its own query heads: these rows of the global weight.
        box = row_box(
            f"model.layers.{layer}.self_attn.gate_proj.weight",
            (model.heads * dim, model.hidden_size),
            self.heads.first_query * dim,
            self.heads.queries * dim,
            0,
            (build.mesh.rank,),
        )
        self.gate = build.column((box,))

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, recompute: bool = False
    ) -> Tensor:
        qkv_SBE, gate_SBE = self.qkv(x_sBH), self.gate(x_sBH)
        if recompute:
            mixed_SBE = checkpoint(
                self.core_attention, qkv_SBE, positions, use_reentrant=False, preserve_rng_state=False
            )
        else:
            mixed_SBE = self.core_attention(qkv_SBE, positions, cache)
        # As prologue of the projection, the product is computed again in backward instead of being kept.
        return self.out(mixed_SBE, gate_SBE, prologue=gated)
