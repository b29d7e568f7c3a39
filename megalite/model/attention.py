"""Grouped-query attention, its heads split over the tensor ranks.

S sequence, s its part outside tensor-parallel blocks, B micro-batch, H hidden, D head dim; Q query and K key/value
heads of the model, q and k those of this rank. A rank holds the key/value heads that its query heads read. If the
tensor size does not divide K, neighbouring ranks replicate the heads they share, and the replicas' gradients are summed
once a step (`Box.partial`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.config import ModelConfig
from megalite.kernels.attention import Documents
from megalite.kernels.attention.decode import Filled
from megalite.kernels.rope import split_qkv
from megalite.mesh import Mesh
from megalite.model.all_heads_norm import AllHeadsNorm
from megalite.model.build import Build
from megalite.parallel.heads import HeadSplit, split_heads
from megalite.parallel.linear import gather_ahead
from megalite.placement import Box, row_box


@dataclass(frozen=True)
class Positions:
    """Positions of a micro-batch's tokens: rotary tables [S, D] or [S, B, D], and document numbers [S, B] or None;
    `local` are the tables of layers with a window, where they have others. `filled` is what a cache of buffers holds
    with the only token of each row, whose count the host does not know."""

    cos: Tensor
    sin: Tensor
    documents_SB: Tensor | Documents | None = None
    local: tuple[Tensor, Tensor] | None = None
    filled: Filled | None = None

    def tables(self, local: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a layer with or without a window."""
        return self.local if local and self.local is not None else (self.cos, self.sin)

    @cached_property
    def documents(self) -> Documents | None:
        """The documents as attention takes them; built once and shared by all layers."""
        numbers_SB = self.documents_SB
        return Documents(numbers_SB) if isinstance(numbers_SB, Tensor) else numbers_SB


class KeyValueCache(Protocol):
    """The cached tensors of earlier tokens: `extend` appends a layer's new ones [S, ...] (keys and values, or whatever
    it caches per token) and returns all of them, [T, ...]."""

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]: ...


def _query_box(name: str, rest: tuple[int, ...], split: HeadSplit, model: ModelConfig, mesh: Mesh) -> Box:
    """This rank's queries among the rows [heads * head_dim, *rest] of a global tensor, first in its local one."""
    dim, shape = model.head_dim, (model.heads * model.head_dim, *rest)
    return row_box(name, shape, split.first_query * dim, split.queries * dim, 0, (mesh.rank,))


def _key_boxes(
    name: str, rest: tuple[int, ...], split: HeadSplit, model: ModelConfig, mesh: Mesh, row: int
) -> Iterator[Box]:
    """This rank's keys or values among the rows [kv_heads * head_dim, *rest], from `row` on in its local tensor."""
    dim, shape = model.head_dim, (model.kv_heads * model.head_dim, *rest)
    peers = [split_heads(model.heads, model.kv_heads, mesh.tp, index) for index in range(mesh.tp)]
    for place, kv in enumerate(range(split.first_kv, split.first_kv + split.kvs)):
        holders = [mesh.rank_at(tp=i) for i, peer in enumerate(peers) if 0 <= kv - peer.first_kv < peer.kvs]
        yield row_box(name, shape, kv * dim, dim, row + place * dim, holders, partial=len(holders) > 1)


def _projection_boxes(prefix: str, split: HeadSplit, model: ModelConfig, mesh: Mesh, kind: str) -> tuple[Box, ...]:
    """The boxes of the fused query/key/value weight (`kind` "weight") or bias: queries, then keys, then values."""
    rest = (model.hidden_size,) if kind == "weight" else ()
    queries, keys = split.queries * model.head_dim, split.kvs * model.head_dim
    return (
        _query_box(f"{prefix}.q_proj.{kind}", rest, split, model, mesh),
        *_key_boxes(f"{prefix}.k_proj.{kind}", rest, split, model, mesh, queries),
        *_key_boxes(f"{prefix}.v_proj.{kind}", rest, split, model, mesh, queries + keys),
    )


class GroupedQueryAttention(nn.Module):
    """norm'd hidden [s, B, H] -> attention output [s, B, H] (Ainslie et al. 2023)."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, mesh = build.model, build.mesh
        prefix, dim = f"model.layers.{layer}.self_attn", model.head_dim
        self.layer, self.dim, self.kernels = layer, dim, build.kernels
        self.window, self.rotates = model.window(layer), layer not in model.no_rope_layers
        self.scores = {"scale": model.attention_multiplier or None, "softcap": model.attn_logit_softcapping or None}
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
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if model.qk_norm and model.qk_norm_scope == "all_heads":
            q_box = _query_box(f"{prefix}.q_norm.weight", (), self.heads, model, mesh)
            k_boxes = _key_boxes(f"{prefix}.k_norm.weight", (), self.heads, model, mesh, 0)
            self.q_norm, self.k_norm = AllHeadsNorm(build, (q_box,)), AllHeadsNorm(build, tuple(k_boxes))
        elif model.qk_norm:
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
        return self.out(gather_ahead(mixed_SBE, qkv_SBE))

    def core_attention(self, qkv_SBE: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """Everything between the two projections: query/key norm, rotary embedding, attention itself."""
        tables, heads = positions.tables(self.window is not None), (self.heads.queries, self.heads.kvs, self.dim)
        if self.rotates and self.q_norm is None:
            q_SBqD, k_SBkD, v_SBkD = self.kernels.rope_qkv(qkv_SBE, *tables, *heads)
        else:
            q_SBqD, k_SBkD, v_SBkD = split_qkv(qkv_SBE, *heads)
            if self.q_norm is not None and self.k_norm is not None:
                q_SBqD, k_SBkD = self.q_norm(q_SBqD), self.k_norm(k_SBkD)
            if self.rotates:
                q_SBqD, k_SBkD = self.kernels.rope(q_SBqD, k_SBkD, *tables)
        if cache is not None:
            k_SBkD, v_SBkD = cache.extend(self.layer, k_SBkD, v_SBkD)
        if self.kv_index is not None:
            k_SBkD, v_SBkD = k_SBkD.index_select(2, self.kv_index), v_SBkD.index_select(2, self.kv_index)
        qkv, seen = (q_SBqD, k_SBkD, v_SBkD), {"window": self.window, **self.scores}
        if positions.filled is not None:
            mixed_SBqD = self.kernels.decode_attention(*qkv, positions.filled, **seen)
        else:
            mixed_SBqD = self.kernels.attention(*qkv, causal=True, documents=positions.documents, **seen)
        return mixed_SBqD.flatten(2)
