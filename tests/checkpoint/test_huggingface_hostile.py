"""Whatever lies in a Hugging Face directory: one line that names the file, soon, in little memory; or success."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface_config import huggingface_config, model_config_from_huggingface
from megalite.errors import UserError
from megalite.generation.loading import open_checkpoint
from megalite.model.families import FAMILIES
from tests.fixtures import golden

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[2]

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 10**9, 2**31 - 1, 2**63, 10**400, -(10**4000)]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, float("inf"), -0.0]),
    st.text(max_size=8),
    st.sampled_from(["\0", "a\nb", "yarn", "llama3", "default", "sliding_attention", "x" * 5000]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=8,
)
_KEYS = sorted({name for family in FAMILIES for name in (*family.defaults, *family.fixed, *family.without_effect)})
_CHANGES = st.dictionaries(
    st.one_of(
        st.sampled_from(_KEYS),
        st.sampled_from(["rope_parameters", "rope_scaling", "layer_types", "sliding_window", "dtype", "architectures"]),
        st.text(max_size=8),
    ),
    _VALUES,
    max_size=3,
)


_ROPE_KEYS = ("rope_type", "type", "factor", "rope_theta", "beta_fast", "truncate", "mscale", "low_freq_factor")
_ROPE_CHANGES = st.dictionaries(st.sampled_from([*_ROPE_KEYS, "original_max_position_embeddings"]), _VALUES, max_size=2)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(golden.NAMES), _CHANGES, _ROPE_CHANGES)
def test_any_config_is_read_or_refused_in_one_line(name: str, changes: dict[str, Any], rope: dict[str, Any]) -> None:
    config = json.loads((golden.folder(name) / "config.json").read_text())
    config["rope_parameters"] = config["rope_parameters"] | rope
    try:
        model = model_config_from_huggingface(config | changes, "DIR/config.json")
    except UserError as error:
        assert str(error).startswith("DIR/config.json: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    assert model_config_from_huggingface(huggingface_config(model, "float32")) == model


def _hostile_file(path: Path) -> dict[str, Callable[[], None]]:
    def link(target: str) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def fifo() -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def folder() -> None:
        path.unlink(missing_ok=True)
        path.mkdir()

    return {
        "endless": lambda: link("/dev/zero"),
        "pipe": fifo,
        "folder": folder,
        "loop": lambda: link(path.name),
        "nested": lambda: _put(path, b"[" * 200_000),
        "digits": lambda: _put(path, b'{"model_type": ' + b"9" * 5000 + b"}"),
        "not UTF-8": lambda: _put(path, b'{"model_type": "\xff\xfe"}'),
        "list": lambda: _put(path, b"[1, 2]"),
        "binary": lambda: _put(path, bytes(range(256)) * 20),
    }


def _put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


KINDS = list(_hostile_file(Path("x")))
NAMES = ("config.json", "model.safetensors", "model.safetensors.index.json", "generation_config.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "tokenizer_config.json"])
def test_hostile_files(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden.folder("llama3_gqa"), folder)
    _hostile_file(folder / name)[kind]()
    with pytest.raises(UserError) as raised:
        import_huggingface(folder, tmp_path / "run")
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


CONFIGS: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "4000 layers of no file": {"num_hidden_layers": 4000},
    "a billion positions": {"max_position_embeddings": 10**9},
    "a huge vocabulary": {"vocab_size": 2**31 - 1},
    "400 digits": {"hidden_size": 10**400},
    "a list": {"hidden_size": [[[48]]]},
    "eos beyond everything": {"eos_token_id": 10**400},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_numbers_cost_nothing(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden.folder("llama3_gqa"), folder)
    config = copy.deepcopy(json.loads((folder / "config.json").read_text())) | CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(UserError) as raised, open_checkpoint(folder):
        pass
    assert time.process_time() - began < 10
    assert "\n" not in str(raised.value)


def test_a_pipe_instead_of_weights_ends_a_program_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden.folder("llama3_gqa"), folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), "from-hf", str(folder), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == f"error: {folder}/model.safetensors is not a regular file\n"
