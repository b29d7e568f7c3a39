"""One layer of the decoder, made of the attention and the feed-forward that the configuration names.

s sequence outside tensor-parallel blocks, B micro-batch, H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from megalite.model.attention import KeyValueCache, Positions
from megalite.model.build import Build
from megalite.model.moe import MixtureOfExperts
from megalite.registry import look_up


def build_attention(build: Build, layer: int) -> nn.Module:
    """The attention that `model.attention` names."""
    return look_up("model.attention", build.model.attention)(build, layer)


def build_feed_forward(build: Build, layer: int) -> nn.Module:
    """The experts of a sparse layer, or the feed-forward layer that `model.feed_forward` names."""
    if build.model.is_sparse(layer):
        return MixtureOfExperts(build, layer)
    return look_up("model.feed_forward", build.model.feed_forward)(build, layer)


def build_block(build: Build, layer: int) -> nn.Module:
    """The whole decoder layer that `model.block` names."""
    return look_up("model.block", build.model.block)(build, layer)


def scaled(x_sBH: Tensor, multiplier: float) -> Tensor:
    """The multiple of what a part of a layer adds to the residual stream."""
    return x_sBH if multiplier == 1.0 else x_sBH * multiplier


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, prefix = build.model, f"model.layers.{layer}"
        self.multiplier = model.residual_multiplier
        self.attention_norm = build.norm(f"{prefix}.input_layernorm.weight", model.hidden_size)
        self.attention = build_attention(build, layer)
        self.ffn_norm = build.norm(f"{prefix}.post_attention_layernorm.weight", model.hidden_size)
        self.feed_forward = build_feed_forward(build, layer)

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Tensor:
        attended_sBH = self.attention(self.attention_norm(x_sBH), positions, cache, recompute=selective)
        x_sBH, normed_sBH = self.ffn_norm.add_and_norm(scaled(attended_sBH, self.multiplier), x_sBH)
        return x_sBH + scaled(self.feed_forward(normed_sBH, recompute=selective), self.multiplier)
