"""The configuration's section `model`: the architecture, without any layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megalite.config.bounds import Above, AtLeast, Named
from megalite.config.fields import DERIVED, Count, CountOrNone, derive
from megalite.config.rope_scaling import RopeScaling, yarn_magnitude
from megalite.registry import BUILT_IN

FULL, SLIDING = "full_attention", "sliding_attention"

TRAINING_ONLY = ("aux_loss", "aux_loss_scope", "router_z_loss", "router_bias_rate")
"""Fields that say how routers are trained, not what the model computes."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family, dense or with experts."""

    layers: Annotated[int, AtLeast(1, 10_000)] = 8
    """Decoder layers."""
    hidden_size: Annotated[int, AtLeast(1, 2**20)] = 512
    """Width of the residual stream."""
    ffn_hidden_size: Annotated[int, AtLeast(1, 2**24)] = DERIVED
    """Inner width of the SwiGLU feed-forward; by default 8/3 of hidden_size, rounded up to a multiple of 64 (or, where
    every layer has experts of a given width, that)."""
    heads: Annotated[int, AtLeast(1, 2**16)] = 8
    """Query heads."""
    kv_heads: Annotated[int, AtLeast(1, 2**16)] = DERIVED
    """Key/value heads: heads is multi-head attention (the default), 1 multi-query, between them grouped-query."""
    head_dim: Annotated[int, AtLeast(0, 2**16)] = DERIVED
    """Width of one head; by default hidden_size / heads, in latent attention qk_nope_head_dim + qk_rope_head_dim."""
    vocab_size: CountOrNone = 0
    """Token ids run from 0 to vocab_size - 1; 0 takes the size from data.tokenizer."""
    max_positions: Annotated[int, AtLeast(1, 2**27)] = 4096
    """Longest sequence, in tokens, that the model is made for."""
    rope_theta: Annotated[float, Above(1, 1e30)] = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: Annotated[dict[str, Any], RopeScaling()] = field(default_factory=dict, hash=False)
    """Scaling of the rotary frequencies, which extends the context; empty for none."""
    norm_eps: Annotated[float, AtLeast(1e-37, 1.0)] = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output layer."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    qk_norm_scope: Literal["head", "all_heads"] = "head"
    """What qk_norm normalises: each head by itself, or all query heads, and all key heads, together (OLMo 2)."""
    zero_centered_norm: bool = False
    """RMSNorms multiply by 1 + weight instead of weight (Gemma)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    kv_lora_rank: Annotated[int, AtLeast(0, 2**16)] = 0
    """Latent attention (`mla`): the width of the latent that a token's keys and values are made of."""
    q_lora_rank: Annotated[int, AtLeast(0, 2**16)] = 0
    """Latent attention: the width of the latent that a token's queries are made of; 0 makes them of the hidden state
    (DeepSeek-V2-Lite)."""
    qk_nope_head_dim: Annotated[int, AtLeast(0, 2**16)] = 0
    """Latent attention: the part of a query or key head that is not rotated."""
    qk_rope_head_dim: Annotated[int, AtLeast(0, 2**16)] = 0
    """Latent attention: the part that is; that of the keys is one for all heads."""
    v_head_dim: Annotated[int, AtLeast(0, 2**16)] = 0
    """Latent attention: the width of a value head."""
    rope_interleave: bool = True
    """Latent attention rotates neighbouring channels together, as DeepSeek stores them; false: channels that are half
    of qk_rope_head_dim apart, as in other attention."""
    sliding_window: CountOrNone = 0
    """A token sees this many tokens, itself among them (Mistral); 0 sees all before it."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] = ()
    """For each layer whether its attention sees all tokens before or the sliding_window; empty: all layers alike."""
    no_rope_layers: tuple[Annotated[int, AtLeast(0, 10_000)], ...] = ()
    """Numbers of the layers, from 0, whose queries and keys are not rotated, as [3, 7] (SmolLM3)."""
    rope_local_theta: Annotated[float, AtLeast(0, 1e30)] = 0.0
    """Base of the rotary frequencies in layers of sliding_attention, which rope_scaling then does not change (Gemma 3);
    0: they rotate as the others do."""
    attention_multiplier: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Factor of the attention scores (Granite, Gemma); 0: 1 / sqrt(head_dim), in latent attention with YaRN times the
    square of its magnitude for mscale_all_dim (DeepSeek)."""
    attn_logit_softcapping: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Bound of the attention scores x, as bound * tanh(x / bound) (Gemma 2); 0: none."""
    final_logit_softcapping: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """The same for the logits (Gemma 2); 0: none."""
    logits_scaling: Annotated[float, Above(0, 1e6)] = 1.0
    """The logits are divided by this (Granite)."""
    embedding_multiplier: Annotated[float, Above(0, 1e6)] = 1.0
    """Factor of the token embeddings, rounded to their dtype (Granite; sqrt(hidden_size) in Gemma)."""
    residual_multiplier: Annotated[float, Above(0, 1e6)] = 1.0
    """Factor of what each attention and feed-forward layer adds to the residual stream (Granite)."""
    experts: CountOrNone = 0
    """Experts of a sparse layer: feed-forward networks out of which every token uses a few; 0: all layers are dense."""
    experts_per_token: Count = 2
    """Experts that a token uses."""
    expert_ffn_hidden_size: Annotated[int, AtLeast(1, 2**24)] = DERIVED
    """Inner width of one expert; by default ffn_hidden_size."""
    shared_experts: CountOrNone = 0
    """Experts that every token uses besides, computed as one network of so many times the width (DeepSeekMoE)."""
    dense_layers: tuple[Annotated[int, AtLeast(0, 10_000)], ...] = ()
    """Numbers of the layers, from 0, that have no experts but one network of width ffn_hidden_size, as [0, 1]."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits; `sigmoid` chooses by score plus a bias that balances the load
    (DeepSeek-V3)."""
    router_renormalise: bool = True
    """Divide the weights of a token's experts by their sum (for softmax: take it over the chosen experts alone)."""
    router_scale: Annotated[float, Above(0, 1e6)] = 1.0
    """Factor of all weights of the experts."""
    router_groups: Count = 1
    """Groups of consecutive experts; a token's experts lie in its best router_groups_per_token of them."""
    router_groups_per_token: Count = DERIVED
    """Groups that a token chooses its experts from; by default half of them."""
    aux_loss: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Weight of the loss that balances the experts' load (Fedus et al. 2021), in each sparse layer; 0.001 to 0.01 are
    usual."""
    aux_loss_scope: Literal["sequence", "batch"] = "sequence"
    """Over what the load is balanced: each sequence, or the global batch, with the loads of the step before."""
    router_z_loss: Annotated[float, AtLeast(0, 1e6)] = 0.0
    """Weight of the mean squared log of the normaliser of the router's logits (ST-MoE uses 0.001)."""
    router_bias_rate: Annotated[float, AtLeast(0, 1.0)] = 0.0
    """By how much a step moves the bias of each expert's score towards an even load, without a loss (Wang et al. 2024;
    0.001 is usual); 0 leaves it as it is."""
    block: Annotated[str, Named(tuple(BUILT_IN["model.block"]))] = "pre_norm"
    """Decoder layer: a norm before attention and feed-forward (`pre_norm`), after them on what they add
    (`reordered_norm`, OLMo 2), or both (`sandwich_norm`, Gemma 2); `module:Class` for one of your own
    (docs/extending.md)."""
    attention: Annotated[str, Named(tuple(BUILT_IN["model.attention"]))] = "gqa"
    """Attention layer: `gqa` (grouped queries), `mla` (latent attention, DeepSeek-V2), or `module:Class` of your
    own."""
    feed_forward: Annotated[str, Named(tuple(BUILT_IN["model.feed_forward"]))] = "swiglu"
    """Feed-forward layer: `swiglu`, `geglu` (the gate through GELU's tanh form, Gemma), or `module:Class` of your
    own."""

    def __post_init__(self) -> None:
        only = self.expert_ffn_hidden_size if self.experts and not self.dense_layers else 0
        even = self.hidden_size // self.heads if self.heads > 0 and self.hidden_size % self.heads == 0 else 0
        derive(
            self,
            ffn_hidden_size=only or -(-self.hidden_size * 8 // (3 * 64)) * 64,
            kv_heads=self.heads,
            head_dim=self.qk_nope_head_dim + self.qk_rope_head_dim if self.latent else even,
            router_groups_per_token=max(1, self.router_groups // 2),
        )
        derive(self, expert_ffn_hidden_size=self.ffn_hidden_size)

        # One way to say the same, since models are compared field by field.
        if self.head_dim and self.attention_multiplier == self._default_scale:
            object.__setattr__(self, "attention_multiplier", 0.0)
        if self.layer_types == (SLIDING if self.sliding_window else FULL,) * self.layers:
            object.__setattr__(self, "layer_types", ())

    def slides(self, layer: int) -> bool:
        """Whether attention of this layer sees the sliding window alone."""
        return self.sliding_window > 0 and (not self.layer_types or self.layer_types[layer] == SLIDING)

    def window(self, layer: int) -> int | None:
        """Tokens that a token sees in this layer, itself among them; None: all before it."""
        return self.sliding_window if self.slides(layer) else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`window` of every layer."""
        return tuple(self.window(layer) for layer in range(self.layers))

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return self.attention_multiplier or self._default_scale

    @property
    def _default_scale(self) -> float:
        weight = self.rope_scaling.get("mscale_all_dim") if self.latent else None
        return self.head_dim**-0.5 * (yarn_magnitude(self.rope_scaling["factor"], weight) ** 2 if weight else 1.0)

    @property
    def latent(self) -> bool:
        """Whether keys and values are made of a latent, which generation caches in their stead."""
        return self.kv_lora_rank > 0

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.qk_rope_head_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.v_head_dim if self.latent else self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward part of this layer is a choice among experts."""
        return self.experts > 0 and layer not in self.dense_layers

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The numbers of all layers with experts."""
        return tuple(layer for layer in range(self.layers) if self.is_sparse(layer))

    @property
    def has_router_bias(self) -> bool:
        """Whether experts are chosen by score plus bias; the bias is a tensor of the model."""
        return self.router == "sigmoid" or self.router_bias_rate > 0

    @property
    def remembers_load(self) -> bool:
        """Whether the loads of the last step are a tensor of the model: the balancing loss reads them."""
        return self.aux_loss > 0 and self.aux_loss_scope == "batch"
