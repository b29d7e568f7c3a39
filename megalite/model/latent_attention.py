"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), its heads split over the tensor ranks.

Keys and values of all heads are made of one latent of a token, and queries may be. Only a part of a head is rotated;
that of the keys is one for all heads. The projections down to the latents and their norms are on every tensor rank, and
work on the rank's part of the sequence; those up to the heads are split by heads.

Generation caches the latent and the rotated part of the key, R + r numbers a token, on every tensor rank. For several
tokens at once keys and values are made of it again. For one, the products with the latent are taken in another order:
q (W c) = (q W) c, so that what is computed for each cached token is R + r wide (ibid., "absorbed").

S sequence, s its part outside tensor-parallel blocks, T cached tokens, B micro-batch, H hidden, h heads of this rank;
of a head D query and key, N the part that is not rotated, r the part that is, V value; R latent of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.model.attention import KeyValueCache, Positions
from megalite.model.build import Build
from megalite.parallel.linear import ColumnParallelLinear, enter_region
from megalite.parallel.products import PLAIN
from megalite.placement import row_box, split_evenly

LATENT_EPS = 1e-6
"""Of the latents' norms in every model of DeepSeek and in transformers, whatever the others' is."""


class LatentAttention(nn.Module):
    """norm'd hidden [s, B, H] -> attention output [s, B, H]."""

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        model, mesh, prefix = build.model, build.mesh, f"model.layers.{layer}.self_attn"
        self.layer, self.kernels, self.region = layer, build.kernels, build.region
        self.window, self.rotates = model.window(layer), layer not in model.no_rope_layers
        self.interleaved = model.rope_interleave
        self.scores: dict[str, Any] = {"scale": model.attention_scale, "softcap": model.attn_logit_softcapping or None}
        self.plain, self.rotated, self.value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        self.latent = model.kv_lora_rank
        first, self.heads = split_evenly(model.heads, mesh.tp, mesh.index("tp"))

        def up(name: str, width: int, inputs: int) -> nn.Module:
            shape, rows = (model.heads * width, inputs), (first * width, self.heads * width)
            return build.column((row_box(f"{prefix}.{name}.weight", shape, *rows, 0, (mesh.rank,)),))

        self.q_down: nn.Module | None = None
        self.q_norm: nn.Module | None = None
        if model.q_lora_rank:
            self.q_down = build.replicated(f"{prefix}.q_a_proj.weight", (model.q_lora_rank, model.hidden_size))
            self.q_norm = build.norm(f"{prefix}.q_a_layernorm.weight", model.q_lora_rank, eps=LATENT_EPS)
            self.q_up = up("q_b_proj", model.head_dim, model.q_lora_rank)
        else:
            self.q_up = up("q_proj", model.head_dim, model.hidden_size)
        down = (self.latent + self.rotated, model.hidden_size)
        self.kv_down = build.replicated(f"{prefix}.kv_a_proj_with_mqa.weight", down)
        self.kv_norm = build.norm(f"{prefix}.kv_a_layernorm.weight", self.latent, eps=LATENT_EPS)
        self.kv_up = up("kv_b_proj", self.plain + self.value, self.latent)
        self.out = build.row(
            f"{prefix}.o_proj.weight",
            (model.hidden_size, model.heads * self.value),
            (first * self.value, self.heads * self.value),
        )

    def forward(
        self, x_sBH: Tensor, positions: Positions, cache: KeyValueCache | None = None, *, recompute: bool = False
    ) -> Tensor:
        q_latent_sBQ = x_sBH
        if self.q_down is not None and self.q_norm is not None:
            q_latent_sBQ = self.q_norm(self.q_down(x_sBH))
        q_SBE = self.q_up(q_latent_sBQ)
        latent_sBR, k_rotated_sBr = self.kv_down(x_sBH).split((self.latent, self.rotated), dim=-1)
        latent_sBR, k_rotated_SBr = self.kv_norm(latent_sBR), enter_region(k_rotated_sBr, self.region)
        if cache is not None:
            return self.out(self._with_cache(q_SBE, latent_sBR, k_rotated_SBr, positions, cache))
        inputs = q_SBE, self.kv_up(latent_sBR), k_rotated_SBr, positions
        if recompute:
            mixed_SBE = checkpoint(self.core_attention, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed_SBE = self.core_attention(*inputs)
        return self.out(mixed_SBE)

    def core_attention(self, q_SBE: Tensor, kv_SBE: Tensor, k_rotated_SBr: Tensor, positions: Positions) -> Tensor:
        """Everything between the projections up and the one out: [S, B, h V]."""
        q_SBhD, k_rotated_SB1r = self._rotate(q_SBE, k_rotated_SBr, positions)
        return self._attend(q_SBhD, kv_SBE, k_rotated_SB1r, positions)

    def _rotate(self, q_SBE: Tensor, k_rotated_SBr: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Whole queries [S, B, h, D], and the rotated part of the keys [S, B, 1, r]."""
        q_SBhD, k_SB1r = q_SBE.unflatten(-1, (self.heads, -1)), k_rotated_SBr.unsqueeze(2)
        q_plain_SBhN, q_SBhr = q_SBhD.split((self.plain, self.rotated), dim=-1)
        if not self.rotates:
            return q_SBhD, k_SB1r
        if self.interleaved:
            q_SBhr, k_SB1r = _halves(q_SBhr), _halves(k_SB1r)
        q_SBhr, k_SB1r = self.kernels.rope(q_SBhr, k_SB1r, *positions.tables(self.window is not None))
        return torch.cat((q_plain_SBhN, q_SBhr), -1), k_SB1r

    def _attend(self, q_SBhD: Tensor, kv_TBE: Tensor, k_rotated_TB1r: Tensor, positions: Positions) -> Tensor:
        """Attention to keys and values that were made of the latents, [S, B, h V]."""
        k_plain_TBhN, v_TBhV = kv_TBE.unflatten(-1, (self.heads, -1)).split((self.plain, self.value), dim=-1)
        k_TBhD = torch.cat((k_plain_TBhN, k_rotated_TB1r.expand(-1, -1, self.heads, -1)), -1)
        return self._mix(q_SBhD, k_TBhD, v_TBhV, positions).flatten(2)

    def _mix(self, q_SBhD: Tensor, k_TBKD: Tensor, v_TBKV: Tensor, positions: Positions) -> Tensor:
        mixed: Tensor = self.kernels.attention(
            q_SBhD, k_TBKD, v_TBKV, causal=True, window=self.window, documents=positions.documents, **self.scores
        )
        return mixed

    def _with_cache(
        self, q_SBE: Tensor, latent_SBR: Tensor, k_rotated_SBr: Tensor, positions: Positions, cache: KeyValueCache
    ) -> Tensor:
        q_SBhD, k_rotated_SB1r = self._rotate(q_SBE, k_rotated_SBr, positions)
        kept_SB1C = torch.cat((latent_SBR.unsqueeze(2), k_rotated_SB1r), -1)
        (kept_TB1C,) = cache.extend(self.layer, kept_SB1C)
        up = self.kv_up
        # An adapter beside the matrix, or products in fp8, would be left out of the other order.
        if len(q_SBE) == 1 and isinstance(up, ColumnParallelLinear) and up.products is PLAIN:
            return self._absorbed(q_SBhD, kept_TB1C, up.weight.gathered(), positions)
        latent_TB1R, k_rotated_TB1r = kept_TB1C.split((self.latent, self.rotated), dim=-1)
        return self._attend(q_SBhD, up(latent_TB1R.squeeze(2)), k_rotated_TB1r, positions)

    def _absorbed(self, q_1BhD: Tensor, kept_TB1C: Tensor, up_ER: Tensor, positions: Positions) -> Tensor:
        """The newest token's attention to the latents themselves, as to one key/value head: [1, B, h V].

        Keys stand for values, too: of what is mixed of them, the rotated part is left out.
        """
        k_up_hNR, v_up_hVR = up_ER.unflatten(0, (self.heads, -1)).split((self.plain, self.value), dim=1)
        q_plain_1BhN, q_1Bhr = q_1BhD.split((self.plain, self.rotated), dim=-1)
        q_1BhR = torch.einsum("sbhn,hnr->sbhr", q_plain_1BhN, k_up_hNR)
        mixed_1BhC = self._mix(torch.cat((q_1BhR, q_1Bhr), -1), kept_TB1C, kept_TB1C, positions)
        return torch.einsum("sbhr,hvr->sbhv", mixed_1BhC[..., : self.latent], v_up_hVR).flatten(2)


def _halves(x_SBnr: Tensor) -> Tensor:
    """Channels 0, 2, 4, … and then 1, 3, 5, …: pairs of neighbours as the rotation expects them, half a head apart."""
    return x_SBnr.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
