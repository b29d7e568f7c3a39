"""Latent attention as the planner sees it: what it keeps for backward, and what its products need if they are put off.

Widths a token and tensor rank, beside those of the layer: Q latent of queries, R latent of keys and values, r rotated
part of the keys. Between the projections fused and plain kernels keep

    projections down and their norms, cut along the sequence: 2 Q, 2 R + r
    attention: queries, keys, values, output, each at the wider of the two widths of a head
    where values are narrower: their padded copy, and apart from attention's output what the projection out reads

`selective` keeps the outputs of the projections up, and r gathered, in the place of what attention keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import ModelConfig
from megalite.parallel.heads import split_heads


@dataclass(frozen=True)
class LatentWidths:
    """Elements a token: of the latents, which every tensor rank has, and of this rank's heads."""

    queries: int
    keys: int
    rotated: int
    up: int
    """What keys and values are made of the latent, before they are put together with the rotated part."""
    wide: int
    """This rank's heads at the wider of both widths of a head."""
    padded: bool
    """Whether values are narrower than keys."""

    @staticmethod
    def of(model: ModelConfig, heads: int) -> LatentWidths | None:
        """Of `heads` heads on a rank; None for other attention."""
        if not model.latent:
            return None
        return LatentWidths(
            queries=model.q_lora_rank,
            keys=model.kv_lora_rank,
            rotated=model.qk_rope_head_dim,
            up=heads * (model.qk_nope_head_dim + model.v_head_dim),
            wide=heads * max(model.head_dim, model.v_head_dim),
            padded=model.v_head_dim < model.head_dim,
        )

    def down_kept(self, size: int, split: int) -> float:
        """Bytes a token of the projections down and their norms."""
        statistics = 8.0 if self.queries else 4.0
        return (size * (2 * self.queries + 2 * self.keys + self.rotated) + statistics) / split

    def attention_kept(self, size: int, heads: int, mixed: int) -> float:
        """Bytes a token between the projections up and the one out, that one's input included."""
        values = self.wide + mixed if self.padded else self.up
        return size * (3 * self.wide + values) + 4.0 * heads

    def exchanged_kept(self, size: int, heads: int, mixed: int, ranks: int) -> float:
        """The same where heads are exchanged over the ranks of a sequence: attention keeps its heads of all rows and
        their output, which is exchanged back for the projection out."""
        share = split_heads(heads, heads, ranks, 0)
        arrived = ranks * (self.wide // heads) * (share.queries + 2 * share.kvs)
        return size * (arrived + self.wide + mixed) + 4.0 * heads

    def selective_kept(self, size: int, query: int, mixed: int, tensor: int) -> float:
        """The same where attention is computed again in backward."""
        return size * (query + self.up + mixed + (self.rotated if tensor > 1 else 0))

    def postponed(self, query: int, mixed: int, split: int) -> float:
        """Elements a token that weight gradients need: inputs and output gradients of all products but those of the
        stream."""
        return query + self.up + mixed + (2 * self.queries + 2 * self.keys + self.rotated) / split
