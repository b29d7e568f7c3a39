"""`config.json` of Hugging Face and megalite's `ModelConfig`, both ways, for the dense Llama family.

Two layouts are read: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of transformers 5
(`rope_parameters`, `dtype`, `layer_types`). What is written is the former, which both versions read. A feature that
changes what the model computes and that megalite does not have is refused by name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megalite.config import ModelConfig
from megalite.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPE_FIELDS = ("torch_dtype", "dtype")

_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}

# Fields that make a layer compute something else: (field, the values that megalite computes, or None for absent).
_MUST_BE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu", "swish", None)),
    ("mlp_bias", (False, None)),
    ("partial_rotary_factor", (1.0, None)),
    ("quantization_config", (None,)),
    ("num_experts", (None, 0)),
    ("num_local_experts", (None, 0)),
    ("logit_scale", (None, 1.0)),
    ("final_logit_softcapping", (None,)),
    ("attn_logit_softcapping", (None,)),
)


def _refuse(where: str, field: str, value: object, remedy: str) -> UserError:
    return UserError(f"{where}: {field} = {value!r} is not supported; {remedy}")


def _number(config: Mapping[str, Any], field: str, where: str, default: float | None = None) -> float:
    """A positive, finite number; `default` where the field is absent or null."""
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{where}: {field} is missing; a {', '.join(ARCHITECTURES)} config.json has it")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{where}: {field} = {value!r} is not a number above 0")
    return value


def _count(config: Mapping[str, Any], field: str, where: str, default: int | None = None) -> int:
    value = _number(config, field, where, default)
    if value != int(value):
        raise UserError(f"{where}: {field} = {value!r} is not a whole number")
    return int(value)


def model_config_from_huggingface(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a Hugging Face `config.json` describes. Raises UserError that begins with `where`."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise _refuse(where, "model_type", kind, f"known are {', '.join(ARCHITECTURES)} (dense models)")
    for field, allowed in _MUST_BE:
        if config.get(field) not in allowed:
            raise _refuse(where, field, config[field], f"megalite computes {field} = {allowed[0]!r} only")
    if kind != "qwen2" and config.get("attention_bias"):
        raise _refuse(where, "attention_bias", True, f"of a {kind} model it means an output bias, which qwen2 lacks")
    hidden, heads = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    layers = _count(config, "num_hidden_layers", where)
    theta, scaling = _rope(config, where)
    return ModelConfig(
        layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_count(config, "intermediate_size", where),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", where, heads),
        head_dim=_count(config, "head_dim", where, max(hidden // heads, 1)),
        vocab_size=_count(config, "vocab_size", where),
        max_positions=_count(config, "max_position_embeddings", where, 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=kind == "qwen3",
        attention_bias=kind == "qwen2",
        sliding_window=_sliding_window(config, kind, layers, where),
    )


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any]]:
    """Base of the rotary frequencies, and the scaling as megalite's configuration writes it."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise _refuse(where, "rope_parameters", parameters, "one table for all layers is")
    theta = _number({"rope_theta": config.get("rope_theta")} | parameters, "rope_theta", where, 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(where, "partial_rotary_factor", parameters["partial_rotary_factor"], "1.0 is")
    if kind == "default":
        return float(theta), {}
    if kind not in _ROPE_KEYS:
        raise _refuse(where, "rope_type", kind, f"known are default, {', '.join(_ROPE_KEYS)}")
    scaling = {key: parameters[key] for key in _ROPE_KEYS[kind] if parameters.get(key) is not None}
    if kind == "yarn":
        positions = _count(config, "max_position_embeddings", where, 2048)
        original = scaling.setdefault("original_max_position_embeddings", positions)
        scaling.setdefault("factor", positions / original)
    for key in ("factor", *_ROPE_KEYS[kind][1:4]) if kind == "llama3" else ("factor",):
        _number(scaling, key, f"{where}: rope parameters")
    return float(theta), {"type": kind, **scaling}


def _sliding_window(config: Mapping[str, Any], kind: str, layers: int, where: str) -> int:
    """Tokens that a query sees, 0 for all; the same in every layer, or refused."""
    window = config.get("sliding_window")
    if kind == "llama" or window is None or (kind != "mistral" and not config.get("use_sliding_window", False)):
        return 0
    types = config.get("layer_types")
    if types is None and kind != "mistral":
        first = int(config.get("max_window_layers", layers))
        types = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    if types is not None and len(set(types)) > 1:
        raise _refuse(where, "layer_types", sorted(set(types)), "the same attention in every layer is")
    if types and types[0] == "full_attention":
        return 0
    return _count(config, "sliding_window", where)


def huggingface_config(model: ModelConfig, dtype: str, special: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`config.json` of a model; `dtype` is `float32`, `bfloat16` or `float16`, `special` its bos and eos ids.

    Raises UserError for a combination of features that no architecture of transformers has.
    """
    kind = _kind_of(model)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "attention_dropout": 0.0,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_positions,
        "model_type": kind,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": _rope_scaling(model.rope_scaling),
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = False
    if kind == "llama":
        config["mlp_bias"] = False
    else:
        config["sliding_window"] = model.sliding_window or None
    if kind in ("qwen2", "qwen3"):
        windowed = model.sliding_window > 0
        config["use_sliding_window"] = windowed
        config["max_window_layers"] = 0 if windowed else model.layers
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * model.layers
    return dict(sorted((config | dict(special or {})).items()))


def _kind_of(model: ModelConfig) -> str:
    """The architecture of transformers that computes what this model does."""
    if model.qk_norm and model.attention_bias:
        raise UserError("model.qk_norm with model.attention_bias: no architecture of transformers has both")
    if model.qk_norm:
        return "qwen3"
    if model.attention_bias:
        return "qwen2"
    return "mistral" if model.sliding_window else "llama"


def _rope_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = scaling.get("rope_type", scaling.get("type", "default")) if scaling else "default"
    if kind == "default":
        return None
    return {"rope_type": kind} | {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
