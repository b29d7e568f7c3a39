"""One layer of the decoder, made of the attention and the feed-forward that the configuration names.

s sequence outside tensor-parallel blocks, B micro-batch, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from megalite.model.attention import KeyValueCache, Positions
from megalite.model.build import Build
from megalite.model.moe import MixtureOfExperts
from megalite.model.norm import RMSNorm
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


class Stream(NamedTuple):
    """The residual stream between two layers: [s, B, H], and what the last layer adds to it where that is not summed
    yet. The next layer's norm sums them in its own pass over memory."""

    total_sBH: Tensor
    added_sBH: Tensor | None = None

    def summed(self) -> Tensor:
        return self.total_sBH if self.added_sBH is None else self.total_sBH + self.added_sBH

    def normed(self, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(the sum, its norm)."""
        if self.added_sBH is None:
            return self.total_sBH, norm(self.total_sBH)
        return norm.add_and_norm(self.added_sBH, self.total_sBH)


class StreamBlock(nn.Module):
    """A layer that can leave its last sum to the next one: `add_to` is the layer between two streams, and calling it
    the whole layer, [s, B, H] -> [s, B, H]."""

    def add_to(
        self, stream: Stream, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Stream:
        raise NotImplementedError

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Tensor:
        return self.add_to(Stream(x_sBH), positions, cache, selective=selective).summed()


class Block(StreamBlock):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, prefix = build.model, f"model.layers.{layer}"
        self.multiplier = model.residual_multiplier
        self.attention_norm = build.norm(f"{prefix}.input_layernorm.weight", model.hidden_size)
        self.attention = build_attention(build, layer)
        self.ffn_norm = build.norm(f"{prefix}.post_attention_layernorm.weight", model.hidden_size)
        self.feed_forward = build_feed_forward(build, layer)

    def add_to(
        self, stream: Stream, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Stream:
        x_sBH, normed_sBH = stream.normed(self.attention_norm)
        attended_sBH = self.attention(normed_sBH, positions, cache, recompute=selective)
        x_sBH, normed_sBH = self.ffn_norm.add_and_norm(scaled(attended_sBH, self.multiplier), x_sBH)
        return Stream(x_sBH, scaled(self.feed_forward(normed_sBH, recompute=selective), self.multiplier))
