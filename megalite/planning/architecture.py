"""A model as the planner sees it: sizes of a layer on one rank, and FLOPs per token.

The sizes are those of the built model (`megalite.model.cost`); an architecture that megalite does not build overrides
`sizes`, for comparisons with published numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import AdapterConfig, ModelConfig
from megalite.model.cost import NO_ADAPTER, LayerSizes, ModelSizes, attention_flops_per_token, model_sizes
from megalite.model.partition import layers_of_stage
from megalite.parallel.heads import split_heads
from megalite.planning.latent_cost import LatentWidths


@dataclass(frozen=True)
class LayerShare:
    """One layer on one tensor rank: widths in elements a token, and weights.

    `query`, `key` (keys alone; values are as many but in latent attention), `mixed` (attention's output) and `ffn` are
    this rank's widths; `queries` its query heads; `cached` is what generation keeps. A token of a sparse layer makes
    `copies` rows, for experts of width `expert_ffn`; `ffn` is then that of the shared ones.
    """

    hidden: int
    query: int
    key: int
    mixed: int
    cached: int
    ffn: int
    queries: int
    kvs: int
    sizes: LayerSizes
    copies: int = 0
    expert_ffn: int = 0
    experts: int = 0
    """Experts of the whole layer: the router's width."""
    latent: LatentWidths | None = None

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest that is trained."""
        return max(matrix.inputs * matrix.outputs for matrix in self.sizes.adapter or self.sizes.matrices)

    @property
    def expert_elements(self) -> int:
        """Elements of this rank's experts: each has three matrices."""
        here = max(matrix.count for matrix in self.sizes.matrices)
        return 3 * here * self.hidden * self.expert_ffn


@dataclass(frozen=True)
class Architecture:
    """A decoder; with an `adapter`, only that is trained, and a scalar head."""

    model: ModelConfig
    adapter: AdapterConfig = NO_ADAPTER

    def sizes(self, tensor: int = 1, index: int = 0, expert: int = 1) -> ModelSizes:
        """Elements on tensor rank `index` of `tensor`, with one of `expert` shares of the experts."""
        return model_sizes(self.model, tensor, index, expert, self.adapter)

    @property
    def frozen(self) -> bool:
        """Whether all but an adapter is."""
        return self.adapter.kind != "none"

    @property
    def matmul_parameters(self) -> int:
        return self.sizes().matmul_parameters(self.model)

    @property
    def parameters(self) -> int:
        return self.sizes().parameters(self.model)

    def flops_per_token(self, seq_length: int, causal: str = "full", recompute: str = "none") -> float:
        """Training FLOPs of a token: products only, forward once and backward twice that.

        `causal` is `full` (the whole square of scores) or `half`. `recompute` adds what is computed again in backward
        (hardware FLOPs): `full` all layers' forward, `selective` the attention's.
        """
        attention = attention_flops_per_token(self.model, seq_length) / {"full": 1, "half": 2}[causal]
        flops = 6.0 * self.matmul_parameters + attention
        if recompute == "full":
            return flops + 2.0 * (self.matmul_parameters - self.sizes().output) + attention / 3
        return flops + (attention / 3 if recompute == "selective" else 0.0)

    def layer(self, tensor: int, index: int = -1, expert: int = 1, *, dense: bool = False) -> LayerShare:
        """The layer on tensor rank `index`; -1 takes the rank that holds most, where key/value heads are uneven. Where
        the model has experts, a layer with one of `expert` shares of them, or, if `dense`, one without."""
        model = self.model
        splits = [split_heads(model.heads, model.kv_heads, tensor, part) for part in range(tensor)]
        index = index if index >= 0 else max(range(tensor), key=lambda part: splits[part].kvs)
        split, dim = splits[index], model.head_dim
        latent = LatentWidths.of(model, split.queries)
        sparse = model.experts > 0 and not dense
        sizes = self.sizes(tensor, index, expert)
        width = model.shared_experts * model.expert_ffn_hidden_size if sparse else model.ffn_hidden_size
        return LayerShare(
            hidden=model.hidden_size,
            query=split.queries * dim,
            key=split.kvs * dim,
            mixed=split.queries * model.value_dim,
            cached=latent.keys + latent.rotated if latent else 2 * split.kvs * dim,
            ffn=width // tensor,
            queries=split.queries,
            kvs=split.kvs,
            sizes=sizes.dense if dense and sizes.dense else sizes.layer,
            copies=model.experts_per_token if sparse else 0,
            expert_ffn=model.expert_ffn_hidden_size // tensor if sparse else 0,
            experts=model.experts if sparse else 0,
            latent=latent,
        )


def vocabulary_rows(architecture: Architecture, tensor: int) -> int:
    """Rows of embedding and output layer on one tensor rank, padding included."""
    return -(-architecture.model.vocab_size // tensor)


def layers_on(architecture: Architecture, stages: int, stage: int) -> int:
    return len(layers_of_stage(architecture.model, stages, stage))
