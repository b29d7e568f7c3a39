"""GPT as published numbers know it: learned positions, LayerNorm, biases everywhere, a feed-forward without a gate."""

from __future__ import annotations

from megalite.model.cost import LayerSizes, Matrix, ModelSizes
from megalite.parallel.heads import split_heads
from megalite.planning.architecture import Architecture, vocabulary_rows


class Gpt(Architecture):
    """Sizes of the same `ModelConfig` as a GPT; `max_positions` are learned."""

    def sizes(self, tensor: int = 1, index: int = 0, expert: int = 1) -> ModelSizes:
        model = self.model
        split = split_heads(model.heads, model.kv_heads, tensor, index)
        hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor
        query, qkv = split.queries * model.head_dim, (split.queries + 2 * split.kvs) * model.head_dim
        matrices = (
            Matrix(hidden, qkv, rows=False),
            Matrix(query, hidden, rows=True),
            Matrix(hidden, ffn, rows=False),
            Matrix(ffn, hidden, rows=True),
        )
        biases, norms = qkv + hidden + ffn + hidden, 4 * hidden
        output = vocabulary_rows(self, tensor) * hidden
        positions = model.max_positions * hidden
        return ModelSizes(LayerSizes(matrices, biases + norms), output + positions, 2 * hidden, output)
