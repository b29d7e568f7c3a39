"""A decoder layer whose attention and feed-forward read the same normed input: x + attention(n) + feed_forward(n).

s sequence outside tensor-parallel blocks, B micro-batch, H hidden. Source: Wang and Komatsuzaki 2021 (GPT-J), with the
single norm of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311).

    [model]
    block = "parallel_block:ParallelBlock"
"""

from __future__ import annotations

from torch import Tensor, nn

from megalite.model.attention import KeyValueCache, Positions
from megalite.model.block import build_attention, build_feed_forward
from megalite.model.build import Build


class ParallelBlock(nn.Module):
    """hidden [s, B, H] -> hidden [s, B, H]."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        self.norm = build.norm(f"model.layers.{layer}.input_layernorm.weight", build.model.hidden_size)
        self.attention = build_attention(build, layer)
        self.feed_forward = build_feed_forward(build, layer)

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Tensor:
        normed_sBH = self.norm(x_sBH)
        attended_sBH = self.attention(normed_sBH, positions, cache, recompute=selective)
        return x_sBH + attended_sBH + self.feed_forward(normed_sBH, recompute=selective)
