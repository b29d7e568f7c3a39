"""The Llama-family decoder, split into pipeline stages; each stage and tensor rank builds only what it holds.

S sequence, s its part outside tensor-parallel blocks (S / tp under sequence parallelism), B micro-batch, H hidden.
Activations are sequence first: hidden_sBH. Source: Touvron et al. 2023 (Llama).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.config import ModelConfig
from megalite.kernels import Kernels
from megalite.mesh import EXPERT_DATA_AXES, Mesh
from megalite.model.attention import KeyValueCache, Positions
from megalite.model.block import Stream, StreamBlock, build_block
from megalite.model.build import Adapter, Build
from megalite.model.partition import layers_of_stage
from megalite.model.rope import rope_table
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.context import ContextRegion
from megalite.parallel.context_attention import ContextAttention
from megalite.parallel.embedding import VocabParallelEmbedding
from megalite.parallel.fp8 import products_of
from megalite.parallel.turns import Turns

EMBEDDING, OUTPUT, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"

CRITIC = "critic."
"""What the names of a critic begin with, in a checkpoint that also holds its policy."""


class Stage(nn.Module):
    """The part of the decoder on one pipeline stage: perhaps the embedding, some layers, perhaps norm and output.

    `stage` counts over pipeline ranks times virtual stages; `owners[stage]` is the pipeline rank that holds a stage.
    `embedding` is the first stage's, if it is in this process, for a tied output layer. Parameters are allocated but
    not initialised: fill them with `megalite.model.init.initialise` or from a checkpoint. `recompute` is `none`,
    `selective` (core attention and SwiGLU are recomputed in backward) or `full` (whole layers are); `fp8` is `none`,
    `tensor`, `row` or `block` (see `megalite.parallel.fp8`). `pieces` cut what sequence parallelism sends, and `keeps`
    is whether what it gathers is kept (`TensorRegion`); `turns` are those of two forward passes at once. `head` is
    `vocabulary` or `scalar`; `prefix` is prepended to all global names; `adapter` wraps linear layers. With `view_of`,
    the parameters are shared with that stage. With a `context`, attention sees the sequence of all its ranks.
    `make_build` makes the layers' context.
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
        pieces: int = 1,
        keeps: bool = False,
        turns: Turns | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        fp8: str = "none",
        z_loss: float = 0.0,
        head: str = "vocabulary",
        prefix: str = "",
        adapter: Adapter | None = None,
        view_of: Stage | None = None,
        context: ContextRegion | None = None,
        make_build: Callable[..., Build] = Build,
    ) -> None:
        super().__init__()
        stages = len(owners)
        self.stage, self.first, self.last = stage, stage == 0, stage == stages - 1
        self.recompute, self.owners = recompute, tuple(owners)
        self.region = TensorRegion(mesh.group("tp"), sequence and mesh.tp > 1, pieces, keeps, turns or Turns())
        if model.experts:  # on every rank, whatever layers it holds: groups must be as many everywhere
            mesh.group("ep")
            mesh.group(*EXPERT_DATA_AXES)
        context = context or ContextRegion.alone(mesh)
        self.kernels, self.context = kernels, context
        # A layer's last sum is left to the next one's norm, except to the compiled norm of CPUs, which would round the
        # gradient of the sum once instead of twice. Whoever hooks into the layers sets this to False.
        self.sums_in_norms = kernels.taken("rms_norm") != "native"
        if context.size > 1:
            kernels = dataclasses.replace(kernels, attention=ContextAttention(context, kernels))
        if view_of is None:
            self.build = make_build(
                model, mesh, self.region, kernels, dtype, products_of(fp8, kernels), prefix, adapter
            )
        else:
            self.build = dataclasses.replace(
                view_of.build,
                region=self.region,
                kernels=kernels,
                adapter=adapter,
                shared=view_of.build.parameters,
                parameters={},
            )
        tied = model.tie_embeddings and head == "vocabulary"
        across = tied and stages > 1
        ends = tuple(sorted({mesh.rank_at(pp=owners[0]), mesh.rank_at(pp=owners[-1])})) if across else (mesh.rank,)
        self.embedding = self.build.embedding(EMBEDDING, ends) if self.first else None
        self.layers = nn.ModuleList(build_block(self.build, layer) for layer in layers_of_stage(model, stages, stage))
        self.norm = self.head = self.scalar = None
        if self.last:
            self.norm = self.build.norm("model.norm.weight", model.hidden_size)
        if self.last and head == "scalar":
            self.scalar = self.build.scalar_head(SCORE)
        elif self.last:
            embedding = self.embedding or embedding
            self.head = self.build.head(
                EMBEDDING if tied else OUTPUT,
                ends,
                z_loss=z_loss,
                tied_to=embedding.weight if tied and embedding is not None else None,
            )
        # As Gemma rounds it; Granite's is a small whole number, which rounding leaves as it is.
        self.embedding_multiplier = torch.tensor(model.embedding_multiplier, dtype=self.build.dtype).item()
        self.cos: Tensor
        self.sin: Tensor
        self.local_cos: Tensor | None
        self.local_sin: Tensor | None
        for name, table in (_tables(model) if view_of is None else view_of.tables()).items():
            self.register_buffer(name, None if table is None else table.to(mesh.device), persistent=False)

    def tables(self) -> dict[str, Tensor | None]:
        """The rotary tables by name, [positions, D]."""
        return {"cos": self.cos, "sin": self.sin, "local_cos": self.local_cos, "local_sin": self.local_sin}

    def whole_sequences(self) -> Stage:
        """A view of this stage with the same parameters but without sequence parallelism, for inference. Without
        sequence parallelism, the stage itself."""
        return self._view(sequence=False, adapter=self.build.adapter) if self.region.sequence else self

    def without_adapter(self) -> Stage:
        """A view of this stage that computes with the same parameters except an adapter's."""
        return self._view(sequence=self.region.sequence, adapter=None)

    def _view(self, *, sequence: bool, adapter: Adapter | None) -> Stage:
        build = self.build
        return Stage(
            build.model,
            build.mesh,
            self.kernels,
            stage=self.stage,
            owners=self.owners,
            embedding=self.embedding,
            sequence=sequence,
            pieces=self.region.pieces,
            keeps=self.region.keeps,
            turns=self.region.turns,
            head="vocabulary" if self.scalar is None else "scalar",
            adapter=adapter,
            view_of=self,
            context=self.context,
        )

    def positions(
        self,
        length: int,
        start: int = 0,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        rows_s: Tensor | None = None,
    ) -> Positions:
        """Rotary tables for `length` positions from `start` on, for these rows of the sequence, or for the given
        position of each token. `documents_BS` are those of all tokens that attention sees."""
        index: slice | Tensor
        if positions_BS is not None:
            index = positions_BS.t()
        else:
            index = slice(start, start + length) if rows_s is None else rows_s.clamp(max=len(self.cos) - 1)
        documents_SB = None if documents_BS is None or positions_BS is None else documents_BS.t()
        local = None
        if self.local_cos is not None and self.local_sin is not None:
            local = self.local_cos[index], self.local_sin[index]
        return Positions(self.cos[index], self.sin[index], documents_SB, local)

    def forward(self, x: Tensor, positions: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """Token ids [B, S] (first stage) or hidden [s, B, H] -> hidden [s, B, H], on the last stage before its norm."""
        hidden_sBH = self.embedding(x) if self.embedding is not None else x
        if self.embedding is not None and self.embedding_multiplier != 1.0:
            hidden_sBH = hidden_sBH * self.embedding_multiplier
        stream, selective = Stream(hidden_sBH), self.recompute == "selective"
        for block in self.layers:
            if self.recompute == "full" and torch.is_grad_enabled():  # which keeps one tensor a layer, not two
                out_sBH = checkpoint(block, stream.summed(), positions, use_reentrant=False, preserve_rng_state=False)
                stream = Stream(out_sBH)
            elif self.sums_in_norms and isinstance(block, StreamBlock):
                stream = block.add_to(stream, positions, cache, selective=selective)
            else:
                stream = Stream(block(stream.summed(), positions, cache, selective=selective))
        return stream.summed()

    def loss(self, hidden_sBH: Tensor, labels_BS: Tensor, scale: Tensor | float) -> Tensor:
        """Last stage: `scale` times the sum of token losses, an fp64 scalar, equal on all tensor ranks."""
        assert self.norm is not None and self.head is not None
        return self.head.loss(self.norm(hidden_sBH), labels_BS, scale)

    def logprobs(self, hidden_sBH: Tensor, labels_BS: Tensor, temperature: float = 1.0) -> Tensor:
        """Last stage: log-probabilities of the labels [B, S], fp32; see `VocabParallelHead.logprobs`."""
        assert self.norm is not None and self.head is not None
        return self.head.logprobs(_cooled(self.norm(hidden_sBH), temperature), labels_BS)

    def label_stats(self, hidden_sBH: Tensor, labels_BS: Tensor, temperature: float = 1.0) -> Tensor:
        """Last stage, no gradient: [2, B, S], see `VocabParallelHead.label_stats`."""
        assert self.norm is not None and self.head is not None
        return self.head.label_stats(_cooled(self.norm(hidden_sBH), temperature), labels_BS)

    def label_stats_at(self, hidden_sBH: Tensor, places_N: Tensor, labels_N: Tensor) -> Tensor:
        """Last stage, no gradient: [2, N], see `VocabParallelHead.label_stats_at`."""
        assert self.norm is not None and self.head is not None
        return self.head.label_stats_at(self.norm(hidden_sBH), places_N, labels_N)

    def values(self, hidden_sBH: Tensor) -> Tensor:
        """Last stage with a scalar head: one fp32 value per position, [B, S], differentiable."""
        assert self.norm is not None and self.scalar is not None
        return self.scalar(self.norm(hidden_sBH))

    def logits(self, hidden_sBH: Tensor) -> Tensor:
        """Last stage: logits [S, B, V] over the true vocabulary, on every tensor rank."""
        assert self.norm is not None and self.head is not None
        return self.head.logits(self.norm(hidden_sBH))


def _tables(model: ModelConfig) -> dict[str, Tensor | None]:
    """Cosines and sines of all layers, and those of layers with a window where they are others."""
    cos, sin = rope_table(model.rotary_dim, model.max_positions, model.rope_theta, model.rope_scaling)
    local_cos = local_sin = None
    if model.rope_local_theta:
        local_cos, local_sin = rope_table(model.rotary_dim, model.max_positions, model.rope_local_theta, {})
    return {"cos": cos, "sin": sin, "local_cos": local_cos, "local_sin": local_sin}


def _cooled(normed_sBH: Tensor, temperature: float) -> Tensor:
    """The output layer is linear, so dividing its input by the temperature divides the logits."""
    return normed_sBH if temperature == 1.0 else normed_sBH / temperature
