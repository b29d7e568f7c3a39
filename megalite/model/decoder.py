"""The Llama-family decoder, cut into pipeline stages; each stage and tensor rank builds only what it holds.

S sequence, s its part outside tensor-parallel blocks (S / tp where sequence parallel), B micro-batch, H hidden,
F feed-forward, f this rank's part of it. Activations are sequence first: hidden_sBH.
Source: Touvron et al. 2023 (Llama), Ainslie et al. 2023 (grouped queries), Shazeer 2020 (SwiGLU).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.config import ModelConfig
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.attention import Attention, KeyValueCache, Positions
from megalite.model.cost import output_in_layers
from megalite.model.head import VocabParallelHead
from megalite.model.norm import RMSNorm
from megalite.model.rope import rope_table
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.fp8 import products_of
from megalite.parallel.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megalite.placement import row_box, split_evenly

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        mesh: Mesh,
        region: TensorRegion,
        kernels: Kernels,
        std: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        prefix, hidden, ffn = f"model.layers.{layer}.mlp", model.hidden_size, model.ffn_hidden_size
        start, length = split_evenly(ffn, mesh.tp, mesh.index("tp"))
        boxes = tuple(
            row_box(f"{prefix}.{name}.weight", (ffn, hidden), start, length, row, (mesh.rank,))
            for name, row in (("gate_proj", 0), ("up_proj", length))
        )
        self.kernels = kernels
        self.gate_up = ColumnParallelLinear(hidden, boxes, (), region, **kwargs)
        self.down = RowParallelLinear(
            f"{prefix}.down_proj.weight", (hidden, ffn), (start, length), mesh.rank, region, std, **kwargs
        )

    def forward(self, x_sBH: Tensor, *, recompute: bool = False) -> Tensor:
        gate_up_SBf = self.gate_up(x_sBH)
        if recompute:
            return self.down(gate_up_SBf, prologue=self.kernels.swiglu)
        return self.down(self.kernels.swiglu(gate_up_SBf))


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, model: ModelConfig, layer: int, mesh: Mesh, region: TensorRegion, kernels: Kernels, **kwargs: Any
    ) -> None:
        super().__init__()
        # Sequence parallel, each rank normalises its own tokens: the weights' gradients are parts of a sum.
        norm = (model.hidden_size, model.norm_eps, mesh.ranks_along("tp"), kernels)
        prefix, std = f"model.layers.{layer}", 0.02 / math.sqrt(2 * model.layers)
        self.attention_norm = RMSNorm(f"{prefix}.input_layernorm.weight", *norm, partial=region.sequence, **kwargs)
        self.attention = Attention(model, layer, mesh, region, kernels, std, **kwargs)
        self.ffn_norm = RMSNorm(f"{prefix}.post_attention_layernorm.weight", *norm, partial=region.sequence, **kwargs)
        self.feed_forward = FeedForward(model, layer, mesh, region, kernels, std, **kwargs)

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, selective: bool = False
    ) -> Tensor:
        attended_sBH = self.attention(self.attention_norm(x_sBH), positions, cache, recompute=selective)
        x_sBH, normed_sBH = self.ffn_norm.after_add(attended_sBH, x_sBH)
        return x_sBH + self.feed_forward(normed_sBH, recompute=selective)


def layers_of_stage(model: ModelConfig, stages: int, stage: int) -> range:
    """The global numbers of the layers on a stage.

    The last stage also multiplies by the vocabulary, and holds as many layers fewer as makes the slowest stage fastest,
    counted in matrix elements; the embedding costs next to nothing. The others are even, the first ones one longer
    where they must be. Every stage holds a layer.
    """
    if stages == 1:
        return range(model.layers)
    output = output_in_layers(model)

    def slowest(last: int) -> float:
        return max(-(-(model.layers - last) // (stages - 1)), last + output)

    last = min(range(1, max(2, model.layers - stages + 2)), key=lambda count: (slowest(count), -count))
    if stage == stages - 1:
        return range(model.layers - last, model.layers)
    first, length = split_evenly(model.layers - last, stages - 1, stage)
    return range(first, first + length)


class Stage(nn.Module):
    """The part of the decoder on one pipeline stage: perhaps the embedding, some layers, perhaps norm and output.

    `stage` counts over pipeline ranks times virtual stages; `owners` says for each stage which pipeline rank holds it.
    `embedding` is that of the first stage where it is in this process, for a tied output layer. Parameters are
    allocated but not initialised: fill them with `megalite.placement.initialise` or from a checkpoint. `recompute` is
    `none`, `selective` (attention between its projections, and SwiGLU, are evaluated again in backward) or `full`
    (whole layers are); `fp8` is `none`, `tensor` or `row` (see `megalite.parallel.fp8`).
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: Mesh,
        kernels: Kernels,
        *,
        stage: int = 0,
        owners: Sequence[int] = (0,),
        embedding: VocabParallelEmbedding | None = None,
        sequence: bool = False,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        fp8: str = "none",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(owners)
        self.stage, self.first, self.last = stage, stage == 0, stage == stages - 1
        self.recompute = recompute
        self.region = TensorRegion(mesh.group("tp"), sequence and mesh.tp > 1)
        region = self.region
        kwargs: dict[str, Any] = {"dtype": dtype, "device": mesh.device}
        vocabulary = (model.vocab_size, model.hidden_size)
        tied = model.tie_embeddings and stages > 1
        ends = tuple(sorted({mesh.rank_at(pp=owners[0]), mesh.rank_at(pp=owners[-1])})) if tied else (mesh.rank,)
        self.embedding = VocabParallelEmbedding(EMBEDDING, *vocabulary, ends, region, **kwargs) if self.first else None
        self.layers = nn.ModuleList(
            Block(model, layer, mesh, region, kernels, **kwargs) for layer in layers_of_stage(model, stages, stage)
        )
        for layer in self.layers.modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                layer.products = products_of(fp8)
        self.norm = self.head = None
        if self.last:
            self.norm = RMSNorm(
                "model.norm.weight",
                model.hidden_size,
                model.norm_eps,
                mesh.ranks_along("tp"),
                kernels,
                partial=region.sequence,
                **kwargs,
            )
            name = EMBEDDING if model.tie_embeddings else OUTPUT
            embedding = self.embedding or embedding
            shared = embedding.weight if model.tie_embeddings and embedding is not None else None
            self.head = VocabParallelHead(
                name, *vocabulary, ends, region, kernels, z_loss=z_loss, tied_to=shared, **kwargs
            )
        cos, sin = rope_table(model.head_dim, model.max_positions, model.rope_theta, model.rope_scaling)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos.to(mesh.device), persistent=False)
        self.register_buffer("sin", sin.to(mesh.device), persistent=False)

    def positions(
        self, length: int, start: int = 0, positions_BS: Tensor | None = None, documents_BS: Tensor | None = None
    ) -> Positions:
        """Rotation tables for `length` positions from `start` on, or for each token its own (restarting documents)."""
        if positions_BS is None:
            window = slice(start, start + length)
            return Positions(self.cos[window], self.sin[window])
        index_SB = positions_BS.t()
        documents_SB = None if documents_BS is None else documents_BS.t()
        return Positions(self.cos[index_SB], self.sin[index_SB], documents_SB)

    def forward(self, x: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """Token ids [B, S] (first stage) or hidden [s, B, H] -> hidden [s, B, H], on the last stage before its norm."""
        hidden_sBH = self.embedding(x) if self.embedding is not None else x
        for block in self.layers:
            if self.recompute == "full" and torch.is_grad_enabled():
                hidden_sBH = checkpoint(block, hidden_sBH, positions, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_sBH = block(hidden_sBH, positions, cache, selective=self.recompute == "selective")
        return hidden_sBH

    def loss(self, hidden_sBH: Tensor, labels_BS: Tensor, scale: Tensor | float) -> Tensor:
        """Last stage: `scale` times the sum of the token losses, an fp64 scalar equal on all tensor ranks."""
        assert self.norm is not None and self.head is not None
        return self.head.loss(self.norm(hidden_sBH), labels_BS, scale)

    def logits(self, hidden_sBH: Tensor) -> Tensor:
        """Last stage: logits [S, B, V] over the true vocabulary, on every tensor rank."""
        assert self.norm is not None and self.head is not None
        return self.head.logits(self.norm(hidden_sBH))
