"""Grouped-query attention, its heads split over the tensor ranks.

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden, D head dim; Q query and K key/value
heads of the model, q and k those of this rank. A rank holds the key/value heads that its query heads read. If the
tensor size does not divide K, neighbouring ranks replicate the heads they share, and the replicas' gradients are summed
once a step (`Box.partial`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.config import ModelConfig
from megalite.kernels.attention import Documents
from megalite.mesh import Mesh
from megalite.model.build import Build
from megalite.parallel.heads import HeadSplit, split_heads
from megalite.placement import Box, row_box


@dataclass(frozen=True)
class Positions:
    """Positions of a micro-batch's tokens: rotary tables [S, D] or [S, B, D], and document numbers [S, B] or None."""

    cos: Tensor
    sin: Tensor
    documents_SB: Tensor | Documents | None = None

    @cached_property
    def documents(self) -> Documents | None:
        """The documents as attention takes them; built once and shared by all layers."""
        numbers_SB = self.documents_SB
        return Documents(numbers_SB) if isinstance(numbers_SB, Tensor) else numbers_SB


class KeyValueCache(Protocol):
    """The cached tensors of earlier tokens: `extend` appends a layer's new ones [S, ...] (keys and values, or whatever
    it caches per token) and returns all of them, [T, ...]."""

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]: ...


def _projection_boxes(prefix: str, split: HeadSplit, model: ModelConfig, mesh: Mesh, kind: str) -> tuple[Box, ...]:
    """The boxes of the fused query/key/value weight (`kind` "weight") or bias: queries, then keys, then values."""
    dim, rest = model.head_dim, (model.hidden_size,) if kind == "weight" else ()
    shape = (model.heads * dim, *rest)
    boxes = [row_box(f"{prefix}.q_proj.{kind}", shape, split.first_query * dim, split.queries * dim, 0, (mesh.rank,))]
    row = split.queries * dim
    peers = [split_heads(model.heads, model.kv_heads, mesh.tp, index) for index in range(mesh.tp)]
    for projection in ("k_proj", "v_proj"):
        for kv in range(split.first_kv, split.first_kv + split.kvs):
            holders = [mesh.rank_at(tp=i) for i, peer in enumerate(peers) if 0 <= kv - peer.first_kv < peer.kvs]
            shape = (model.kv_heads * dim, *rest)
            name = f"{prefix}.{projection}.{kind}"
            boxes.append(row_box(name, shape, kv * dim, dim, row, holders, partial=len(holders) > 1))
            row += dim
    return tuple(boxes)


class GroupedQueryAttention(nn.Module):
    """norm'd hidden [s, B, H] -> attention output [s, B, H] (Ainslie et al. 2023)."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, mesh = build.model, build.mesh
        prefix, dim = f"model.layers.{layer}.self_attn", model.head_dim
        self.layer, self.dim, self.kernels = layer, dim, build.kernels
        self.window = model.sliding_window or None
        self.heads = split_heads(model.heads, model.kv_heads, mesh.tp, mesh.index("tp"))
        self.kv_index: Tensor | None
        index = None if self.heads.grouped else torch.tensor(self.heads.kv_of_query, device=mesh.device)
        self.register_buffer("kv_index", index, persistent=False)
        bias = _projection_boxes(prefix, self.heads, model, mesh, "bias") if model.attention_bias else ()
        self.qkv = build.column(_projection_boxes(prefix, self.heads, model, mesh, "weight"), bias)
        self.out = build.row(
            f"{prefix}.o_proj.weight",
            (model.hidden_size, model.heads * dim),
            (self.heads.first_query * dim, self.heads.queries * dim),
        )
        self.q_norm = self.k_norm = None
        if model.qk_norm:
            # Each rank normalises its own heads with the shared weight, so its gradient is one term of a sum.
            self.q_norm = build.norm(f"{prefix}.q_norm.weight", dim, partial=True)
            self.k_norm = build.norm(f"{prefix}.k_norm.weight", dim, partial=True)

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, recompute: bool = False
    ) -> Tensor:
        qkv_SBE = self.qkv(x_sBH)
        if recompute:
            mixed_SBE = checkpoint(
                self.core_attention, qkv_SBE, positions, use_reentrant=False, preserve_rng_state=False
            )
        else:
            mixed_SBE = self.core_attention(qkv_SBE, positions, cache)
        return self.out(mixed_SBE)

    def core_attention(self, qkv_SBE: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """Everything between the two projections: query/key norm, rotary embedding, attention itself."""
        q_SBqD, k_SBkD, v_SBkD = qkv_SBE.unflatten(-1, (-1, self.dim)).split(
            (self.heads.queries, self.heads.kvs, self.heads.kvs), dim=2
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_SBqD, k_SBkD = self.q_norm(q_SBqD), self.k_norm(k_SBkD)
        q_SBqD, k_SBkD = self.kernels.rope(q_SBqD, k_SBkD, positions.cos, positions.sin)
        if cache is not None:
            k_SBkD, v_SBkD = cache.extend(self.layer, k_SBkD, v_SBkD)
        if self.kv_index is not None:
            k_SBkD, v_SBkD = k_SBkD.index_select(2, self.kv_index), v_SBkD.index_select(2, self.kv_index)
        mixed_SBqD = self.kernels.attention(
            q_SBqD, k_SBkD, v_SBkD, causal=True, window=self.window, documents=positions.documents
        )
        return mixed_SBqD.flatten(2)
