"""No tensor is dropped or missed in silence, whatever the files call it and however they cut it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.huggingface.export import export_huggingface
from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.source import CheckpointReader
from megalite.checkpoint.writer import CheckpointWriter
from megalite.config import ModelConfig, load_config
from megalite.errors import UserError
from megalite.generation.loading import open_checkpoint
from megalite.model import families
from megalite.model.families.family import Family, FileTensor, Rows
from megalite.model.families.llama import LLAMA, decoder_tensors
from tests.fixtures import golden

pytestmark = pytest.mark.fast

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROOT = Path(__file__).parents[2]

Tensors = dict[str, torch.Tensor]


def _copy(folder: Path, name: str, tensors: Tensors | None = None, **changes: Any) -> Path:
    """A fixture with other fields in config.json (None removes one) and other tensors."""
    folder.mkdir()
    config = json.loads((golden.folder(name) / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    save_file(tensors or _tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensors(name: str) -> Tensors:
    return load_file(golden.folder(name) / "model.safetensors")


def _refusal(folder: Path) -> str:
    """What conversion says, which is what generation says."""
    with pytest.raises(UserError) as raised:
        import_huggingface(folder, folder.parent / "run")
    with pytest.raises(UserError) as again, open_checkpoint(folder):
        pass
    assert str(again.value) == str(raised.value)
    assert not (folder.parent / "run").exists()
    return str(raised.value)


def test_only_an_equal_copy_of_the_embedding_is_dropped(tmp_path: Path) -> None:
    tensors = _tensors("llama_tied_mha")
    copy = tensors | {OUTPUT: tensors[EMBEDDING].clone()}
    with HuggingFaceSource(_copy(tmp_path / "equal", "llama_tied_mha", copy)) as source:
        assert OUTPUT not in source.shapes()
    copy[OUTPUT][-1, -1] += 1e-3
    assert "lm_head.weight is the same as model.embed_tokens.weight" in _refusal(
        _copy(tmp_path / "other", "llama_tied_mha", copy)
    )
    copy[OUTPUT] = copy[OUTPUT][:-1].clone()
    assert "lm_head.weight" in _refusal(_copy(tmp_path / "short", "llama_tied_mha", copy))


def test_an_untied_model_needs_its_output_layer(tmp_path: Path) -> None:
    folder = _copy(tmp_path / "model", "llama_tied_mha", tie_word_embeddings=False)
    assert "lm_head.weight is missing" in _refusal(folder)


def test_names_without_model(tmp_path: Path) -> None:
    """A directory that `LlamaModel.save_pretrained` wrote is the same model, in every program."""
    bare = {name.removeprefix("model."): tensor for name, tensor in _tensors("llama_tied_mha").items()}
    bare |= {OUTPUT: bare["embed_tokens.weight"].clone(), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = _copy(tmp_path / "bare", "llama_tied_mha", bare, architectures=["LlamaModel"])
    for name, tensor in _tensors("llama_tied_mha").items():
        with open_checkpoint(folder) as opened:
            assert torch.equal(opened.source.read(name, (0,) * tensor.dim(), tensor.shape), tensor)
    import_huggingface(folder, tmp_path / "run")
    with CheckpointReader(tmp_path / "run") as reader:
        export_huggingface(reader, tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == _tensors("llama_tied_mha").keys()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_layer_for_further_tokens_is_left_out(tmp_path: Path) -> None:
    """The one after DeepSeek-V3's 61; any other that config.json does not count is refused."""
    tensors, name = _tensors("deepseek3_experts"), "model.layers.{}.eh_proj.weight"
    with open_checkpoint(_copy(tmp_path / "v3", "deepseek3_experts", tensors | {name.format(61): torch.ones(2, 2)})):
        pass
    other = _copy(tmp_path / "other", "deepseek3_experts", tensors | {name.format(60): torch.ones(2, 2)})
    assert name.format(60) in _refusal(other)


def test_two_places_for_the_weights(tmp_path: Path) -> None:
    """An index beside a whole file, and a shard that holds more than the index says."""
    folder = _copy(tmp_path / "model", "llama3_gqa")
    tensors = _tensors("llama3_gqa")
    save_file(tensors, folder / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "holds both model.safetensors and model.safetensors.index.json" in _refusal(folder)
    (folder / "model.safetensors").unlink()
    save_file(tensors | {"model.gate": torch.ones(3)}, folder / "shard.safetensors")
    assert "shard.safetensors holds 'model.gate', which model.safetensors.index.json does not put" in _refusal(folder)


def test_fields_that_change_nothing_survive_a_changed_model(tmp_path: Path) -> None:
    """Trained on with a longer context, an imported model keeps its family and its special tokens."""
    fields = {"sliding_window": 8, "eos_token_id": [2, 5], "pad_token_id": 7, "initializer_range": 0.5}
    import_huggingface(_copy(tmp_path / "model", "mistral_swa", **fields), tmp_path / "run")
    with CheckpointReader(tmp_path / "run") as reader:
        model = ModelConfig(**reader.manifest.model)
    changed = dataclasses.replace(model, sliding_window=0, rope_theta=5e5)
    _write_run(tmp_path / "run", changed, _tensors("mistral_swa"))
    with CheckpointReader(tmp_path / "run") as reader:
        export_huggingface(reader, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "mistral"
    assert written["sliding_window"] is None
    assert {name: written[name] for name in list(fields)[1:]} == {name: fields[name] for name in list(fields)[1:]}


def _write_run(run: Path, model: ModelConfig, tensors: Tensors) -> None:
    path = run / "checkpoints" / "step_00000009"
    with CheckpointWriter(path, step=9, model=asdict(model), state={}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def test_export_refuses_a_tensor_that_the_architecture_lacks(tmp_path: Path) -> None:
    """A gate that somebody added to attention: transformers would load the model without it."""
    with HuggingFaceSource(golden.folder("llama3_gqa")) as source:
        model = source.model
    gate = {"model.layers.0.self_attn.gate.weight": torch.ones(6, 48)}
    _write_run(tmp_path / "run", model, _tensors("llama3_gqa") | gate)
    with CheckpointReader(tmp_path / "run") as reader, pytest.raises(UserError) as raised:
        export_huggingface(reader, tmp_path / "back")
    assert "gate.weight is not part of LlamaForCausalLM" in str(raised.value)
    assert not (tmp_path / "back").exists()


def test_export_refuses_a_field_that_the_architecture_lacks() -> None:
    """Also one that `ModelConfig` gets later."""

    @dataclass(frozen=True)
    class Gated(ModelConfig):
        attention_gate: bool = False

    plain, gated = (Gated(vocab_size=9, attention_gate=gate) for gate in (False, True))

    def read(fields: Any) -> ModelConfig:
        return Gated(**asdict(LLAMA.read(fields)))

    family = dataclasses.replace(LLAMA, read=read)
    assert family.unlike(plain) == ""
    assert family.unlike(gated) == "LlamaForCausalLM has no model.attention_gate = True"


def _fused_tensors(model: ModelConfig) -> Iterator[FileTensor]:
    """Queries, keys and values as one matrix, gate and up as a stack of two, the rest under other names."""
    fused: dict[str, list[Rows]] = {}
    for tensor in decoder_tensors(model):
        name = tensor.name
        for word, other in (
            ("q_proj", "qkv"),
            ("k_proj", "qkv"),
            ("v_proj", "qkv"),
            ("gate_proj", "gu"),
            ("up_proj", "gu"),
        ):
            name = name.replace(word, other)
        fused.setdefault(name.replace("model.layers", "blocks"), []).extend(tensor.parts)
    for name, parts in fused.items():
        rows, rest = sum(part.count for part in parts), parts[0].shape[1:]
        shape = (2, rows // 2, *rest) if name.endswith("gu.weight") else (rows, *rest)
        yield FileTensor(name, shape, tuple(parts))


def test_a_family_with_fused_tensors_of_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In, any box of it, and out again as the same bytes: nothing but the family knows."""
    family: Family = dataclasses.replace(
        LLAMA, model_type="fused", architectures=("FusedForCausalLM",), tensors=_fused_tensors
    )
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    plain = _tensors("llama3_gqa")
    with HuggingFaceSource(golden.folder("llama3_gqa")) as source:
        stored = {
            tensor.name: torch.cat([plain[part.name] for part in tensor.parts]).view(tensor.shape).contiguous()
            for tensor in _fused_tensors(source.model)
        }
    changes = {"model_type": "fused", "architectures": ["FusedForCausalLM"]}
    folder = _copy(tmp_path / "fused", "llama3_gqa", stored, **changes)
    with HuggingFaceSource(folder) as source:
        for name, tensor in plain.items():
            start = tuple(extent // 3 for extent in tensor.shape)
            size = tuple(extent // 2 for extent in tensor.shape)
            expected = tensor[tuple(slice(first, first + length) for first, length in zip(start, size))]
            assert torch.equal(source.read(name, start, size), expected), name
    import_huggingface(folder, tmp_path / "run")
    with CheckpointReader(tmp_path / "run") as reader:
        assert reader.shapes() == {name: tuple(tensor.shape) for name, tensor in plain.items()}
        export_huggingface(reader, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_recipe_of_an_import_works_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "from-hf"]
    folder = _copy(tmp_path / "model", "llama3_gqa")
    shutil.copy(ROOT / "tests/fixtures/make_huggingface.py", folder / "tokenizer.model")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "model", "run"], cwd=tmp_path, check=True, env=environment, capture_output=True)
    config = load_config(tmp_path / "run" / "config.toml")
    assert config.run.dir == str(tmp_path / "run")
    assert config.data.tokenizer == str(tmp_path / "run" / "huggingface" / "tokenizer.model")
