"""The fields of latent attention must fit each other, and stand beside no other attention."""

from __future__ import annotations

from megalite.config.check_alignment import Refuse
from megalite.config.schema import Config

_NEEDED = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_OWN = ("q_lora_rank", *_NEEDED)


def check_latent(config: Config, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit the others."""
    model = config.model
    if model.attention == "gqa":
        for name in _OWN:
            if getattr(model, name):
                remedy = "leave it out, or set model.attention = mla"
                refuse(config, f"model.{name}", "has no effect with model.attention = gqa", remedy)
        return
    if model.attention != "mla" and not model.latent:  # an attention of the user's own
        return
    for name in _NEEDED:
        if not getattr(model, name):
            remedy = f"give {', '.join(f'model.{each}' for each in _NEEDED)}"
            refuse(config, f"model.{name}", f"is needed by model.attention = {model.attention}", remedy)
    if model.qk_rope_head_dim % 2:
        problem = "does not split into the pairs that rotary positions turn"
        refuse(config, "model.qk_rope_head_dim", problem, "use an even size")
    parts = model.qk_nope_head_dim + model.qk_rope_head_dim
    if model.head_dim != parts:
        problem = f"is not model.qk_nope_head_dim + model.qk_rope_head_dim = {parts}"
        refuse(config, "model.head_dim", problem, "leave it out")
    if model.kv_heads != model.heads:
        problem = f"is not model.heads = {model.heads}, and in latent attention every head has keys of its own"
        refuse(config, "model.kv_heads", problem, "leave it out")
    for name in ("qk_norm", "attention_bias"):
        if getattr(model, name):
            problem = f"is not part of model.attention = {model.attention}, which normalises its latents"
            refuse(config, f"model.{name}", problem, "leave it out")
