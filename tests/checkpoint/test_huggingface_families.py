"""Every family against transformers: defaults, generated configurations, tensors; equal, or refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface_config import model_config_from_huggingface
from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.model.families import FAMILIES, Family, family_of_config, family_of_model
from megalite.model.shapes import model_shapes
from tests.fixtures import golden

BY_TYPE = {family.model_type: family for family in FAMILIES}
LENGTH = 40
REQUIRED: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 6},
}
"""Fields without a default."""

Choices = dict[str, list[Any]]
"""For each field the values to draw from; `...` is an absent field."""

_SIZES: Choices = {
    "hidden_size": [32, 48],
    "intermediate_size": [24],
    "num_hidden_layers": [1, 2],
    "num_attention_heads": [4, 8],
    "num_key_value_heads": [..., None, 2, 4, 8],
    "head_dim": [..., ..., None, 6, 8],
    "vocab_size": [37],
    "max_position_embeddings": [..., 64, 256],
    "rms_norm_eps": [..., 1e-5],
    "tie_word_embeddings": [..., ..., True, False],
}
_FLAGS: Choices = {
    "hidden_act": [..., "silu", "swish", "gelu"],
    "attention_bias": [..., ..., False, True],
    "mlp_bias": [..., ..., ..., False, True],
    "sliding_window": [..., None, 5, 9],
    "use_sliding_window": [..., ..., False, True],
    "max_window_layers": [..., ..., 0, 1, 2],
    "layer_types": [..., ..., ..., ["full_attention"], ["sliding_attention"], ["full_attention", "sliding_attention"]],
    "pretraining_tp": [..., ..., 1, 2],
    "partial_rotary_factor": [..., ..., ..., ..., 1.0, 0.5],
    "initializer_range": [..., 0.05],
    "torch_dtype": [..., "float32"],
}
_SCALINGS: list[Any] = [
    ...,
    ...,
    None,
    {},
    {"rope_type": "default"},
    {"rope_theta": 500.0, "rope_type": "default"},
    {"type": "linear", "factor": 3.0},
    {"rope_type": "linear", "type": "yarn", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1 << 30},
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False, "beta_fast": 8},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0, "rope_theta": 900.0},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5, "beta_slow": None, "finetuned": True},
    {"rope_type": "yarn", "factor": 8.0, "truncate": None},
    {"rope_type": "dynamic", "factor": 2.0},
]
_ROTARY: Choices = {
    "rope_theta": [..., ..., 500.0, 1e6],
    "rope_scaling": _SCALINGS,
    "rope_parameters": [..., ..., ..., *_SCALINGS],
    "original_max_position_embeddings": [..., ..., ..., 24],
}
_BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
_LATENT: Choices = {
    "num_hidden_layers": [2, 3],
    "num_key_value_heads": [..., None, 4, 8],
    "q_lora_rank": [None, 10, 14],
    "kv_lora_rank": [10, 12],
    "qk_nope_head_dim": [8],
    "qk_rope_head_dim": [4, 6, 5],
    "head_dim": [..., ..., 4, 6],
    "v_head_dim": [5, 16],
    "n_routed_experts": [4, 8],
    "num_experts_per_tok": [1, 2, 3],
    "n_shared_experts": [1, 2],
    "moe_intermediate_size": [12],
    "first_k_dense_replace": [0, 1, 2],
    "n_group": [1, 2],
    "topk_group": [1, 2],
    "routed_scaling_factor": [..., 1.0, 2.5],
    "moe_layer_freq": [..., 1],
}
_OWN: dict[str, Choices] = {
    "mixtral": {
        "num_local_experts": [..., 4, 6],
        "num_experts_per_tok": [..., 1, 3],
        "router_jitter_noise": [..., ..., 0.0, 0.1],
        "output_router_logits": [..., False],
        "head_dim": [6, 8],  # transformers cannot scale rotations where this one is null or absent
    },
    "qwen3_moe": {
        "num_experts": [4, 6],
        "num_experts_per_tok": [1, 2, 3],
        "moe_intermediate_size": [20],
        "decoder_sparse_step": [..., 1, 2],
        "mlp_only_layers": [..., None, [], [0]],
        "norm_topk_prob": [..., False, True],
    },
    "smollm3": {
        "no_rope_layers": [..., None, [0, 1, 1], [1, 0, 0]],
        "no_rope_layer_interval": [..., 1, 2],
        "pad_token_id": [None, 3],
    },
    "granite": {
        "embedding_multiplier": [..., 12.0, 3],
        "attention_multiplier": [..., 0.25],
        "residual_multiplier": [..., 0.22],
        "logits_scaling": [..., 8.0],
    },
    "olmo3": {"rope_theta": [..., 5e5], "sliding_window": [5, 9], "rope_parameters": [..., _BY_TYPE]},
    "gemma2": {
        "head_dim": [..., 6, 12],
        "query_pre_attn_scalar": [..., 8, 20],
        "attn_logit_softcapping": [..., None, 2.0],
        "final_logit_softcapping": [..., None, 3.0],
        "hidden_act": [..., ..., "gelu_pytorch_tanh"],
        "hidden_activation": [..., "gelu_pytorch_tanh", "silu"],
        "sliding_window": [5, 9],
    },
    "gemma3_text": {
        "head_dim": [..., 6, 12],
        "query_pre_attn_scalar": [..., 8, 20],
        "final_logit_softcapping": [..., None, 3.0],
        "hidden_act": [..., ..., "gelu_pytorch_tanh"],
        "hidden_activation": [..., "gelu_pytorch_tanh", "silu"],
        "sliding_window": [5, 9],
        "sliding_window_pattern": [..., 1, 2],
        "rope_local_base_freq": [..., ..., 500.0],
        "rope_parameters": [..., _BY_TYPE],
    },
    "phi3": {"pad_token_id": [None, 3]},
    "dots1": {
        "n_routed_experts": [4, 8],
        "num_experts_per_tok": [1, 2, 3],
        "n_shared_experts": [1, 2],
        "moe_intermediate_size": [12],
        "first_k_dense_replace": [..., 0, 1],
        "n_group": [..., 1, 2],
        "topk_group": [..., 1, 2],
        "norm_topk_prob": [..., False, True],
        "routed_scaling_factor": [..., 1.0, 2.5],
    },
    "deepseek_v2": {**_LATENT, "topk_method": [..., "greedy", "group_limited_greedy", "noaux_tc"]},
    "deepseek_v3": {
        **_LATENT,
        "qk_nope_head_dim": [7, 8],
        "norm_topk_prob": [..., None, False, True],
        "rope_interleave": [..., None, False, True],
        "num_nextn_predict_layers": [..., 1],
    },
}


def _generate(draw: random.Random, kind: str) -> dict[str, Any]:
    """Half of the fields of each kind at their most innocent, so that many configurations are accepted."""
    config: dict[str, Any] = {"model_type": kind}
    for choices, oddity in ((_SIZES, 1.0), (_FLAGS, 0.25), (_ROTARY, 0.6), (_OWN.get(kind, {}), 1.0)):
        for name, values in choices.items():
            value = draw.choice(values) if draw.random() < oddity else ...
            if value is not ...:
                config[name] = value
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = (config["layer_types"] * 2)[: config["num_hidden_layers"]]
    return config


def _weights(family: Family, model: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(as transformers holds them in memory, as megalite's global tensors)"""
    theirs, ours = {}, {}
    for tensor in (family.stacked_tensors or family.tensors)(model):
        matrix = len(tensor.shape) > 1
        centre = 0.0 if model.zero_centered_norm else 1.0
        values = torch.randn(tensor.shape) * (tensor.shape[-1] ** -0.5 if matrix else 0.3)
        values += 0.0 if matrix else centre
        theirs[tensor.name] = values
        rows = values.flatten(0, -2) if matrix else values
        for first, part in tensor.placed_parts():
            whole = ours.setdefault(part.name, torch.empty(part.shape))
            whole[part.first : part.first + part.count] = rows[first : first + part.count]
    return theirs, ours


def _our_logits(model: ModelConfig, weights: dict[str, torch.Tensor], ids_BS: torch.Tensor) -> torch.Tensor:
    stage = Stage(model, Mesh(), select_kernels({"default": "reference"}, golden.CPU))
    with torch.no_grad():
        for parameter in stage.parameters():
            for box in parameter.placement.boxes:
                box.view(parameter).copy_(box.of(weights[box.name]))
        return stage.logits(stage(ids_BS, stage.positions(ids_BS.shape[1]))).transpose(0, 1)


def _their_logits(folder: Path, weights: dict[str, torch.Tensor], ids_BS: torch.Tensor) -> torch.Tensor:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(ids_BS).logits


@pytest.mark.parametrize("kind", BY_TYPE)
def test_generated_configurations_give_the_same_logits_or_are_refused(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5, an optional dependency")
    seed = random.randrange(1 << 32)
    draw, accepted = random.Random(seed), 0
    ids_BS = torch.randint(37, (2, LENGTH))
    for _ in range(3000):
        if accepted == 25:
            return
        config = _generate(draw, kind)
        try:
            model = BY_TYPE[kind].read_config(config, "config.json")
        except UserError:
            continue
        accepted += 1
        theirs, ours = _weights(BY_TYPE[kind], model)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            expected = _their_logits(tmp_path, theirs, ids_BS)
        except Exception as error:
            raise AssertionError(f"seed {seed}: transformers refuses {config}") from error
        difference = (_our_logits(model, ours, ids_BS) - expected).abs().max()
        assert difference < 5e-5 * max(1.0, expected.std()), f"seed {seed}: {config}"
    raise AssertionError(f"seed {seed}: only {accepted} configurations were accepted")


@pytest.mark.parametrize("kind", BY_TYPE)
def test_absent_fields_take_the_defaults_of_the_configuration_class(kind: str) -> None:
    """All keys that transformers writes are known, and mean what their absence means."""
    transformers = pytest.importorskip(
        "transformers", minversion="5.0", reason="needs transformers 5, an optional dependency"
    )
    family = BY_TYPE[kind]
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    rotary = theirs["rope_parameters"]
    by_type = {
        "rope_local_base_freq": rotary.get("sliding_attention", {}).get("rope_theta"),
        "sliding_window_pattern": theirs.get("_sliding_window_pattern"),
    }
    written = {"rope_theta": rotary.get("full_attention", rotary)["rope_theta"], **by_type, **theirs}
    derived = {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": None}  # from others, when it is made
    for name, value in family.defaults.items():
        assert written.get(name, derived.get(name)) in (value, derived.get(name, value)), name
    required = REQUIRED.get(kind, {})
    ours = family.read_config({"model_type": kind, **required}, "config.json")
    assert family.read_config(theirs | required, "config.json") == ours


@pytest.mark.fast
@pytest.mark.parametrize("kind", BY_TYPE)
def test_defaults(kind: str) -> None:
    """As transformers' configuration classes have them, where it is not installed as well."""
    model = BY_TYPE[kind].read_config({"model_type": kind, **REQUIRED.get(kind, {})}, "config.json")
    sizes = (model.kv_heads, model.head_dim, model.ffn_hidden_size, model.max_positions, model.sliding_window)
    assert (
        sizes
        == {
            "llama": (32, 128, 11008, 2048, 0),
            "mistral": (8, 128, 14336, 131072, 4096),
            "qwen2": (32, 128, 22016, 32768, 0),
            "qwen3": (32, 128, 22016, 32768, 0),
            "mixtral": (8, 128, 14336, 131072, 0),
            "qwen3_moe": (4, 64, 6144, 32768, 0),
            "dots1": (32, 144, 10944, 2048, 0),
            "olmo2": (32, 128, 11008, 2048, 0),
            "olmo3": (32, 128, 11008, 2048, 4096),
            "phi3": (32, 96, 8192, 4096, 0),
            "granite": (32, 128, 11008, 2048, 0),
            "smollm3": (4, 128, 11008, 32768, 0),
            "gemma2": (4, 256, 9216, 8192, 4096),
            "gemma3_text": (4, 256, 9216, 131072, 4096),
            "deepseek_v2": (32, 192, 11008, 2048, 0),
            "deepseek_v3": (128, 192, 18432, 4096, 0),
        }[kind]
    )


@pytest.mark.fast
@pytest.mark.parametrize("name", golden.NAMES)
def test_the_tensors_of_a_family_tile_those_of_the_model(name: str) -> None:
    """Every row of every global tensor is in one place of the files, and the model has no other."""
    config = json.loads((golden.folder(name) / "config.json").read_text())
    family = family_of_config(config, name)
    model = family.read_config(config, name)
    rows: dict[str, set[int]] = {}
    shapes = {}
    for tensor in family.tensors(model):
        for _, part in tensor.placed_parts():
            shapes[part.name] = part.shape
            new = set(range(part.first, part.first + part.count))
            assert not new & rows.setdefault(part.name, set())
            rows[part.name] |= new
    assert shapes == model_shapes(model)
    assert all(len(rows[part]) == shape[0] for part, shape in shapes.items())


@pytest.mark.fast
@pytest.mark.parametrize("name", golden.NAMES)
def test_the_family_of_a_model(name: str) -> None:
    """What a model was imported as is kept where that still computes it; otherwise the plainest that does is taken."""
    config = json.loads((golden.folder(name) / "config.json").read_text())
    family = family_of_config(config, name)
    assert family_of_model(family.read_config(config, name), family.model_type) is family
    plain = BY_TYPE["mistral"].read_config({"model_type": "mistral", "sliding_window": None}, "config.json")
    assert family_of_model(plain, "mistral").model_type == "mistral"
    assert family_of_model(plain).model_type == "llama"
    assert (
        family_of_model(BY_TYPE["mistral"].read_config({"model_type": "mistral"}, ""), "llama").model_type == "mistral"
    )


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = "),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta = "),
    (
        {
            "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 32,
        },
        "original_max_position_embeddings = 32",
    ),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "rope_scaling.type = 'linear'"),
    ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype = 'bfloat16'"),
    ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'"),
    ({"architectures": ["MistralForCausalLM"]}, "architectures = "),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, "layer_types = "),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "layer_types = "),
    ({"model_type": "qwen2", "attention_bias": False}, "attention_bias = False"),
    ({"model_type": "qwen3", "head_dim": None}, "head_dim = None"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = "),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
    ({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}, "quantization_config = "),
    ({"model_type": "deepseek_v3", "num_key_value_heads": 8}, "num_key_value_heads = 8"),
    ({"model_type": "deepseek_v3", "head_dim": 56}, "head_dim = 56"),
    ({"model_type": "deepseek_v3", "n_group": 7}, "n_group = 7"),
    ({"model_type": "deepseek_v3", "first_k_dense_replace": 61}, "first_k_dense_replace = 61"),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "norm_topk_prob": True}, "norm_topk_prob = True"),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("changes", "named"), CONTRADICTIONS, ids=[named for _, named in CONTRADICTIONS])
def test_what_contradicts_itself_or_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as raised:
        model_config_from_huggingface({"model_type": "llama"} | changes, "DIR/config.json")
    assert str(raised.value).startswith(f"DIR/config.json: {named}")
    assert "\n" not in str(raised.value)


@pytest.mark.fast
def test_the_original_length_beside_the_table_counts() -> None:
    changes = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32}
    scaling = model_config_from_huggingface({"model_type": "llama"} | changes).rope_scaling
    assert scaling == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
