"""What a model consists of: its parameters, whole and on one rank, and the FLOPs of a token.

Megalite's models are a `ModelConfig`. Published numbers are often about GPTs, so an `Architecture` also says how those
differ: two feed-forward matrices instead of three, biases, LayerNorm, learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import ModelConfig
from megalite.model.attention import split_heads
from megalite.model.cost import matmul_parameters, parameter_count
from megalite.model.partition import layers_of_stage

FLOPS_FULL = "6 * matmul parameters + 12 * layers * heads * head_dim * sequence (attention's whole square)"
FLOPS_HALF = "6 * matmul parameters + 6 * layers * heads * head_dim * sequence (only what a causal token sees)"


@dataclass(frozen=True)
class Architecture:
    """A decoder. `gated`: SwiGLU; `biases`: on every projection and norm, as in GPT; positions: learned ones."""

    model: ModelConfig
    gated: bool = True
    biases: bool = False
    learned_positions: int = 0

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def projection_bias(self) -> bool:
        return self.biases or self.model.attention_bias

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: all matrices and the output layer, not the embedding."""
        ungated = 0 if self.gated else self.model.layers * self.model.hidden_size * self.model.ffn_hidden_size
        return matmul_parameters(self.model) - ungated

    @property
    def parameters(self) -> int:
        """All parameters, exact."""
        model, hidden = self.model, self.model.hidden_size
        total = parameter_count(model) - matmul_parameters(model) + self.matmul_parameters
        if self.biases:
            qkv = 0 if model.attention_bias else model.head_dim * (model.heads + 2 * model.kv_heads)
            layer = qkv + hidden + self.model.ffn_hidden_size * (self.ffn_matrices - 1) + hidden + 2 * hidden
            total += model.layers * layer + hidden
        return total + self.learned_positions * hidden

    def attention_flops(self, seq_length: int, causal: str) -> float:
        """Of a token, forward and backward; `causal` is `full` (the whole square of scores) or `half`."""
        factor = {"full": 12, "half": 6}[causal]
        return float(factor * self.model.layers * self.model.heads * self.model.head_dim * seq_length)

    def flops_per_token(self, seq_length: int, causal: str = "full", recompute: str = "none") -> float:
        """Training FLOPs of a token: products only, forward once and backward twice that.

        `recompute` adds what is computed again in backward (hardware FLOPs): `full` all layers' forward, `selective`
        the attention's.
        """
        attention = self.attention_flops(seq_length, causal)
        flops = 6.0 * self.matmul_parameters + attention
        if recompute == "full":
            output = self.model.vocab_size * self.model.hidden_size
            return flops + 2.0 * (self.matmul_parameters - output) + attention / 3
        return flops + (attention / 3 if recompute == "selective" else 0.0)


@dataclass(frozen=True)
class LayerShare:
    """One layer on one tensor rank: widths in elements a token, and weights.

    `query`, `key` (keys alone; values are as many) and `ffn` are this rank's widths; `queries` its query heads.
    """

    hidden: int
    query: int
    key: int
    ffn: int
    queries: int
    kvs: int
    matrices: tuple[tuple[int, int], ...]
    """(input, output) features of the layer's products: query/key/value, attention output, up (and gate), down."""
    vectors: int

    @property
    def parameters(self) -> int:
        return sum(inner * outer for inner, outer in self.matrices) + self.vectors

    @property
    def largest_matrix(self) -> int:
        return max(inner * outer for inner, outer in self.matrices)


def layer_share(architecture: Architecture, tensor: int, index: int = -1) -> LayerShare:
    """The layer on tensor rank `index`; -1 takes the rank that holds most (key/value heads may not divide evenly)."""
    model = architecture.model
    splits = [split_heads(model.heads, model.kv_heads, tensor, part) for part in range(tensor)]
    split = splits[index] if index >= 0 else max(splits, key=lambda one: one.kvs)
    hidden, dim, ffn = model.hidden_size, model.head_dim, model.ffn_hidden_size // tensor
    query, key = split.queries * dim, split.kvs * dim
    up = (architecture.ffn_matrices - 1) * ffn
    vectors = 2 * hidden + (2 * dim if model.qk_norm else 0)
    if architecture.projection_bias:
        vectors += query + 2 * key
    if architecture.biases:
        vectors += 4 * hidden + up
    matrices = ((hidden, query + 2 * key), (query, hidden), (hidden, up), (ffn, hidden))
    return LayerShare(hidden, query, key, ffn, split.queries, split.kvs, matrices, vectors)


def vocabulary_rows(architecture: Architecture, tensor: int) -> int:
    """Rows of embedding and output layer on one tensor rank, padding included."""
    return -(-architecture.model.vocab_size // tensor)


def layers_on(architecture: Architecture, stages: int, stage: int) -> int:
    return len(layers_of_stage(architecture.model, stages, stage))
