"""What the layers of a model are said to be, layer by layer, must fit together."""

from __future__ import annotations

from megalite.config.check_alignment import Refuse
from megalite.config.model import SLIDING, ModelConfig
from megalite.config.schema import Config


def check_layers(config: Config, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit the others."""
    model = config.model
    _check_windows(config, refuse, model)
    if late := [layer for layer in model.no_rope_layers if layer >= model.layers]:
        remedy = f"name layers from 0 to {model.layers - 1}"
        refuse(config, "model.no_rope_layers", f"names layer {late[0]} of {model.layers}", remedy)
    if len(set(model.no_rope_layers)) < len(model.no_rope_layers):
        remedy = "list the numbers of the layers without rotations (Hugging Face's list has a 0 in their places)"
        refuse(config, "model.no_rope_layers", "names a layer twice", remedy)
    if model.qk_norm_scope != "head" and not model.qk_norm:
        refuse(
            config, "model.qk_norm_scope", "has no effect without model.qk_norm", "leave it out, or set model.qk_norm"
        )
    if model.feed_forward == "geglu" and model.experts:
        problem = f"does not fit model.experts = {model.experts}, which are SwiGLU"
        refuse(config, "model.feed_forward", problem, "use swiglu, or no experts")
    if model.final_logit_softcapping and config.objective.data_format == "prompt" and config.rollout.temperature != 1:
        problem = f"does not fit model.final_logit_softcapping = {model.final_logit_softcapping}"
        refuse(config, "rollout.temperature", problem, "use 1, or 0 for no bound of the logits")


def _check_windows(config: Config, refuse: Refuse, model: ModelConfig) -> None:
    types = model.layer_types
    if types and len(types) != model.layers:
        remedy = f"give {model.layers} types, or leave it empty"
        refuse(config, "model.layer_types", f"has {len(types)} types for model.layers = {model.layers}", remedy)
    if types and SLIDING not in types:
        remedy = "leave out both, or name layers that have it"
        refuse(config, "model.sliding_window", "is the window of no layer in model.layer_types", remedy)
    if types and not model.sliding_window:
        problem = f"has layers of {SLIDING}, and model.sliding_window = 0"
        refuse(config, "model.layer_types", problem, "give the window's tokens")
    local = model.rope_local_theta
    if 0 < local <= 1:
        refuse(config, "model.rope_local_theta", "is too small", "use a number above 1, or 0")
    if local and not model.sliding_window:
        refuse(config, "model.rope_local_theta", "is of layers with a window, and there are none", "leave it out")
