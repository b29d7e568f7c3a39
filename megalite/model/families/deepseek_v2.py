"""DeepSeek-V2 and V2-Lite: latent attention, softmax routers, shared experts. Fields and defaults: `DeepseekV2Config`.

transformers and DeepSeek's own code differ where `norm_topk_prob` is true, which no published model has: refused.
"""

from __future__ import annotations

import functools
from typing import Any

from megalite.config import ModelConfig
from megalite.model.families.deepseek import (
    DEEPSEEK_DEFAULTS,
    DEEPSEEK_FIXED,
    DEEPSEEK_WITHOUT_EFFECT,
    latent_tensors,
    read_latent,
    write_latent,
)
from megalite.model.families.family import Family, Fields
from megalite.model.families.llama import ROTARY_FREQUENCIES, require_multiple, tied_output
from megalite.model.families.sparse import MOST_EXPERTS, read_groups

_METHODS = ("greedy", "group_limited_greedy")
"""The values of topk_method: the best of all experts, or of the best groups."""


def _read(fields: Fields) -> ModelConfig:
    method = fields.value("topk_method")
    if method not in _METHODS:
        raise fields.refusal("topk_method", method, f"is not supported; known are {', '.join(_METHODS)}")
    if method == "greedy":
        for name in ("n_group", "topk_group"):  # transformers does not read them
            fields.count(name, MOST_EXPERTS, null=1)
        groups = {"router_groups": 1, "router_groups_per_token": 1}
    else:
        groups = read_groups(fields)
    return require_multiple(fields, read_latent(fields, router="softmax", router_renormalise=False, **groups))


def _write(model: ModelConfig) -> dict[str, Any]:
    method = _METHODS[model.router_groups > 1]
    return write_latent(model, mlp_bias=False, norm_topk_prob=False, scoring_func="softmax", topk_method=method)


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM", "DeepseekV2Model"),
    defaults={
        **DEEPSEEK_DEFAULTS,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "first_k_dense_replace": 0,
        "n_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_group": None,
        "topk_method": "greedy",
        "moe_intermediate_size": 1407,
    },
    fixed={**DEEPSEEK_FIXED, "scoring_func": ("softmax",), "norm_topk_prob": (False,)},
    without_effect=DEEPSEEK_WITHOUT_EFFECT,
    read=_read,
    write=_write,
    tensors=functools.partial(latent_tensors, bias=False),
    copies=tied_output,
    ignored=ROTARY_FREQUENCIES,
    stacked_tensors=functools.partial(latent_tensors, bias=False, stacked=True),
)
