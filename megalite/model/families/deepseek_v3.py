"""DeepSeek-V3 and R1: latent attention, sigmoid routers with a bias and groups, shared experts. Fields and defaults:
`DeepseekV3Config`.

Layers that predict tokens beyond the next one are not read, as transformers does not compute them.
"""

from __future__ import annotations

import functools
import re
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
from megalite.model.families.llama import ROTARY_FREQUENCIES, tied_output
from megalite.model.families.sparse import read_groups

_FURTHER = "counts layers for further tokens, which are not read"


def _read(fields: Fields) -> ModelConfig:
    interleaved = fields.value("rope_interleave") is not None and fields.flag("rope_interleave")
    renormalise = fields.value("norm_topk_prob") is not None and fields.flag("norm_topk_prob")
    router = {"router": "sigmoid", "router_renormalise": renormalise, **read_groups(fields)}
    return read_latent(fields, rope_interleave=interleaved, **router)


def _write(model: ModelConfig) -> dict[str, Any]:
    return write_latent(
        model,
        norm_topk_prob=model.router_renormalise,
        num_nextn_predict_layers=0,
        rope_interleave=model.rope_interleave,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
    )


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM", "DeepseekV3Model"),
    defaults={
        **DEEPSEEK_DEFAULTS,
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rope_interleave": True,
    },
    fixed={**DEEPSEEK_FIXED, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    without_effect=DEEPSEEK_WITHOUT_EFFECT | {"num_nextn_predict_layers": _FURTHER, "num_mtp_layers": _FURTHER},
    read=_read,
    write=_write,
    tensors=functools.partial(latent_tensors, bias=True),
    copies=tied_output,
    ignored=re.compile(rf"{ROTARY_FREQUENCIES.pattern}|model\.layers\.61\..*"),
    stacked_tensors=functools.partial(latent_tensors, bias=True, stacked=True),
)
