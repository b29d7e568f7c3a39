"""Decoder layers that normalise what attention and feed-forward add to the residual stream.

s sequence outside tensor-parallel blocks, B micro-batch, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from megalite.model.attention import KeyValueCache, Positions
from megalite.model.block import Stream, StreamBlock, build_attention, build_feed_forward, scaled
from megalite.model.build import Build


class ReorderedNormBlock(nn.Module):
    """x + norm(attention(x)), then x + norm(feed_forward(x)) (OLMo 2, arXiv:2501.00656, section 3.2)."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        hidden, prefix = build.model.hidden_size, f"model.layers.{layer}"
        self.multiplier = build.model.residual_multiplier
        self.attention = build_attention(build, layer)
        self.attention_out_norm = build.norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.feed_forward = build_feed_forward(build, layer)
        self.ffn_out_norm = build.norm(f"{prefix}.post_feedforward_layernorm.weight", hidden)

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Tensor:
        attended_sBH = self.attention_out_norm(self.attention(x_sBH, positions, cache, recompute=selective))
        x_sBH = x_sBH + scaled(attended_sBH, self.multiplier)
        added_sBH = self.ffn_out_norm(self.feed_forward(x_sBH, recompute=selective))
        return x_sBH + scaled(added_sBH, self.multiplier)


class SandwichNormBlock(StreamBlock):
    """x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x))) (Gemma 2, arXiv:2408.00118, section 2)."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        hidden, prefix = build.model.hidden_size, f"model.layers.{layer}"
        self.multiplier = build.model.residual_multiplier
        self.attention_norm = build.norm(f"{prefix}.input_layernorm.weight", hidden)
        self.attention = build_attention(build, layer)
        self.attention_out_norm = build.norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.ffn_norm = build.norm(f"{prefix}.pre_feedforward_layernorm.weight", hidden)
        self.feed_forward = build_feed_forward(build, layer)
        self.ffn_out_norm = build.norm(f"{prefix}.post_feedforward_layernorm.weight", hidden)

    def add_to(
        self, stream: Stream, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Stream:
        x_sBH, normed_sBH = stream.normed(self.attention_norm)
        attended_sBH = self.attention(normed_sBH, positions, cache, recompute=selective)
        attended_sBH = scaled(self.attention_out_norm(attended_sBH), self.multiplier)
        x_sBH, normed_sBH = self.ffn_norm.add_and_norm(attended_sBH, x_sBH)
        added_sBH = self.ffn_out_norm(self.feed_forward(normed_sBH, recompute=selective))
        return Stream(x_sBH, scaled(added_sBH, self.multiplier))
