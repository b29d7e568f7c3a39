"""Hugging Face configurations in both layouts, both ways; what is not computed is refused by name."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest

from megalite.checkpoint.huggingface_config import huggingface_config, model_config_from_huggingface
from megalite.config import ModelConfig, build_config, to_toml
from megalite.config.check import check_layout
from megalite.errors import UserError
from tests.fixtures import golden

pytestmark = pytest.mark.fast

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def _read(**changes: Any) -> ModelConfig:
    return model_config_from_huggingface(LLAMA | changes, "DIR/config.json")


@pytest.mark.parametrize("name", golden.NAMES)
def test_both_layouts_say_the_same(name: str) -> None:
    new, old = (json.loads((golden.folder(name) / file).read_text()) for file in ("config.json", "config_v4.json"))
    assert model_config_from_huggingface(new) == model_config_from_huggingface(old)


@pytest.mark.parametrize("name", golden.NAMES)
def test_out_and_in_again(name: str) -> None:
    model = model_config_from_huggingface(json.loads((golden.folder(name) / "config.json").read_text()))
    written = json.loads(json.dumps(huggingface_config(model, "bfloat16", {"eos_token_id": 2})))
    assert model_config_from_huggingface(written) == model
    assert (written["torch_dtype"], written["eos_token_id"]) == ("bfloat16", 2)


@pytest.mark.parametrize("name", golden.NAMES)
def test_what_is_read_is_a_valid_configuration(name: str) -> None:
    """As the trainer checks it, and after a way through TOML."""
    model = model_config_from_huggingface(json.loads((golden.folder(name) / "config.json").read_text()))
    config = golden.training_config(model)
    check_layout(config, 1)
    assert build_config(tomllib.loads(to_toml(config))) == config


def test_defaults_of_old_models() -> None:
    """Llama 2's first files have neither kv heads, nor a head size, nor a rotary base."""
    old = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
    model = model_config_from_huggingface(old)
    assert (model.kv_heads, model.head_dim, model.rope_theta, model.tie_embeddings) == (6, 8, 10000.0, False)
    assert _read(rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling == {"type": "linear", "factor": 2.0}


def test_yarn_without_its_original_length() -> None:
    scaling = _read(rope_scaling={"type": "yarn", "factor": 4.0}).rope_scaling
    assert scaling == {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 5}, 5),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "qwen2", "sliding_window": 5}, 0),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": False, "max_window_layers": 0}, 0),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, 5),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 4}, 0),
        ({"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 28}, 0),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 4,
            },
            5,
        ),
    ],
)
def test_sliding_windows(changes: dict[str, Any], window: int) -> None:
    assert _read(**changes).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v9", "n_routed_experts": 8}, "model_type = 'deepseek_v9'"),
        ({"model_type": "qwen3_next"}, "model_type = 'qwen3_next'"),
        ({"model_type": None}, "model_type = None"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one table for all layers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks high_freq_factor, low_freq_factor"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 3,
            },
            "layer_types = ",
        ),
        ({"model_type": "gemma2", "head_dim": 8, "sliding_window": None}, "layer_types = "),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, "is not made of a table for full_"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            "layers of sliding_attention rotate without scaling",
        ),
        ({"model_type": "olmo3", "rope_theta": 1e4}, "rope_theta = 10000.0 is read by transformers 5 as the base of"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers = [1, 2, 1, 0] has other numbers"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers = [1] is not a list of a 0 or a 1 for each"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_type = 'longrope'"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "is not of this architecture"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
        (
            {
                "model_type": "mistral",
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "layer_types",
        ),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"hidden_size": 48.0}, "hidden_size = 48.0"),
        ({"sliding_window": 5}, "sliding_window = 5"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 is not a whole number"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        _read(**changes)
    assert str(raised.value).startswith("DIR/config.json: ")
    assert message in str(raised.value)


def test_windows_in_some_layers() -> None:
    model = _read(model_type="qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=2)
    assert model.windows == (None, None, 5, 5)
    assert model_config_from_huggingface(huggingface_config(model, "float32")) == model


def test_no_architecture_has_both() -> None:
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM has no model\.qk_norm = True"):
        huggingface_config(ModelConfig(qk_norm=True, attention_bias=True, vocab_size=9), "float32")
