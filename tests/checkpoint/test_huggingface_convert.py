"""Conversion both ways: the same bytes come back, the same logits come out, and nothing is ever half written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megalite.checkpoint.huggingface.export import export_huggingface, row_blocks
from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.manifest import Entry, Piece
from megalite.checkpoint.source import CheckpointReader, load_weights
from megalite.checkpoint.writer import CheckpointWriter
from megalite.config import Config, ModelConfig, RunConfig, TrainConfig, build_config, load_config, to_toml
from megalite.errors import UserError
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.model.shapes import model_shapes
from tests.fixtures import golden

HEIGHTS = st.lists(st.integers(1, 9), max_size=8)

Tensors = Mapping[str, torch.Tensor]

TINY = ModelConfig(layers=3, hidden_size=24, ffn_hidden_size=40, heads=6, kv_heads=3, vocab_size=37, max_positions=64)

MODELS: dict[str, ModelConfig] = {
    "llama": replace(
        TINY,
        rope_scaling={
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama, tied": replace(TINY, tie_embeddings=True),
    "llama, linear": replace(TINY, rope_scaling={"type": "linear", "factor": 2.0}),
    "mistral": replace(TINY, sliding_window=9),
    "qwen2": replace(TINY, attention_bias=True),
    "qwen2, windows": replace(TINY, attention_bias=True, sliding_window=9),
    "qwen3": replace(TINY, qk_norm=True, head_dim=8),
    "qwen3, windows": replace(TINY, qk_norm=True, head_dim=8, sliding_window=9),
}


def _random_weights(model: ModelConfig) -> Tensors:
    return {
        name: torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else 1 + torch.randn(shape) * 0.3
        for name, shape in model_shapes(model).items()
    }


def _trained_run(folder: Path, model: ModelConfig, weights: Tensors, precision: str = "fp32") -> Path:
    """A run directory as training leaves it: fp32 weights in pieces of rows and columns, with moments."""
    config = Config(run=RunConfig(dir=str(folder)), model=model, train=TrainConfig(precision=precision))  # type: ignore[arg-type]
    path = folder / "checkpoints" / "step_00000007"
    with CheckpointWriter(path, step=7, model=asdict(model), state={}) as writer:
        for name, weight in weights.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                dim = int("o_proj" in name or "down_proj" in name)
                for start, part in zip((0, 5), weight.split([5, weight.shape[dim] - 5], dim)):
                    offset = [0] * weight.dim()
                    offset[dim] = start
                    writer.add(name, part.contiguous(), shape=weight.shape, offset=offset, kind=kind)
        writer.add_file("config.toml", to_toml(config).encode())
    return folder


def _export(run: Path, target: Path, **options: Any) -> Path:
    with CheckpointReader(run) as reader:
        export_huggingface(reader, target, **options)
    return target


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.fast
@pytest.mark.parametrize("config", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_in_and_out_gives_the_same_bytes(tmp_path: Path, name: str, config: str) -> None:
    """What transformers wrote, configuration and tokenizer files included."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(golden.folder(name) / "model.safetensors", source)
    shutil.copy(golden.folder(name) / config, source / "config.json")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    import_huggingface(source, tmp_path / "run")
    assert _contents(_export(tmp_path / "run", tmp_path / "target")) == _contents(source)


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in golden.NAMES if name.endswith("_experts")])
def test_experts_go_out_and_come_in_as_stacks(tmp_path: Path, name: str) -> None:
    """One tensor for all experts of a layer, as transformers holds them; read again, the same bytes as before."""
    import_huggingface(golden.folder(name), tmp_path / "run")
    stacked = _export(tmp_path / "run", tmp_path / "stacked", stacked_experts=True)
    single, stacks = (load_file(folder / "model.safetensors") for folder in (golden.folder(name), stacked))
    (place,) = {key for key in stacks if key.endswith("layers.1.mlp.experts.gate_up_proj")}
    gate = "block_sparse_moe.experts.2.w1" if name.startswith("mixtral") else "mlp.experts.2.gate_proj"
    expected = single[f"model.layers.1.{gate}.weight"]
    assert torch.equal(stacks[place][2, : len(expected)], expected)
    import_huggingface(stacked, tmp_path / "again")
    back = _export(tmp_path / "again", tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (golden.folder(name) / "model.safetensors").read_bytes()


@pytest.mark.fast
def test_models_without_experts_have_none_to_stack(tmp_path: Path) -> None:
    import_huggingface(golden.folder("llama3_gqa"), tmp_path / "run")
    with pytest.raises(UserError, match="has no experts that could be stacked; leave out --stacked-experts"):
        _export(tmp_path / "run", tmp_path / "target", stacked_experts=True)


@pytest.mark.fast
def test_imported_weights_keep_their_dtypes(tmp_path: Path) -> None:
    """fp16 matrices beside fp32 norms, which no precision of training is, come back as they came."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(golden.folder("llama3_gqa") / "config.json", source)
    tensors = load_file(golden.folder("llama3_gqa") / "model.safetensors")
    mixed = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    import_huggingface(source, tmp_path / "run")
    target = _export(tmp_path / "run", tmp_path / "target")
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.fast
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_out_and_in_and_out_gives_the_same_bytes(tmp_path: Path, kind: str, precision: str) -> None:
    model = MODELS[kind]
    weights = _random_weights(model)
    run = _trained_run(tmp_path / "run", model, weights, precision)
    first = _export(run, tmp_path / "first")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    written = load_file(first / "model.safetensors")
    assert written.keys() == weights.keys()
    assert ("lm_head.weight" in written) != model.tie_embeddings
    for name, weight in weights.items():
        assert torch.equal(written[name], weight.to(dtype)), name
    imported = import_huggingface(first, tmp_path / "again")
    assert imported.model == model
    assert imported.train.precision == precision
    assert load_config(tmp_path / "again" / "config.toml") == imported
    assert _contents(_export(tmp_path / "again", tmp_path / "second")) == _contents(first)


@pytest.mark.fast
def test_several_files(tmp_path: Path) -> None:
    """With an index that names every tensor once; no file above the size unless one tensor alone is."""
    model = MODELS["llama"]
    weights = _random_weights(model)
    run = _trained_run(tmp_path / "run", model, weights)
    target = _export(run, tmp_path / "target", shard_bytes=12_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    found = {}
    for file in files:
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 12_000
        assert {index["weight_map"][name] for name in part} == {file.name}
        found |= part
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.fast
def test_other_dtypes(tmp_path: Path) -> None:
    run = _trained_run(tmp_path / "run", TINY, _random_weights(TINY))
    half = _export(run, tmp_path / "half", dtype="float16")
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.float16}
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "float16"
    with pytest.raises(UserError, match="dtype 'int8'"):
        _export(run, tmp_path / "other", dtype="int8")


@pytest.mark.fast
def test_a_changed_model_is_not_described_by_the_old_configuration(tmp_path: Path) -> None:
    """A run that was imported and went on with a longer context exports what it is now."""
    import_huggingface(golden.folder("llama_yarn"), tmp_path / "run")
    with CheckpointReader(tmp_path / "run") as reader:
        model = build_config({"model": reader.manifest.model}).model
    changed = replace(model, rope_theta=5e5, max_positions=256)
    _trained_run(tmp_path / "run", changed, _random_weights(changed))
    target = _export(tmp_path / "run", tmp_path / "target")
    with HuggingFaceSource(target) as source:
        assert source.model == changed


@pytest.mark.fast
def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _trained_run(tmp_path / "run", TINY, _random_weights(TINY))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for action in (lambda to: _export(run, to), lambda to: import_huggingface(golden.folder("llama3_gqa"), to)):
        with pytest.raises(UserError, match="taken exists already"):
            action(tmp_path / "taken")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("os.fsync", full)
    for action in (lambda to: _export(run, to), lambda to: import_huggingface(golden.folder("llama3_gqa"), to)):
        with pytest.raises(UserError, match="No space left on device"):
            action(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.fast
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(1, 9), max_size=8), st.integers(1, 200)
)
def test_row_blocks(left: list[int], right: list[int], limit: int) -> None:
    """They tile the rows in order, cut no piece, and exceed the limit only where one uncut stretch does."""
    rows = max(sum(left), sum(right))
    pieces, common = [], set(range(rows + 1))
    for column, width, heights in ((0, 2, left), (2, 1, right)):
        edges = sorted({0, rows, *np.cumsum(heights, dtype=int).tolist()})
        pieces += [Piece("f", (start, column), (stop - start, width), 0) for start, stop in pairwise(edges)]
        common &= set(edges)
    reader = _Index({"w": Entry((rows, 3), "F32", pieces[::-1])})
    blocks = list(row_blocks(reader, "w", limit))  # type: ignore[arg-type]
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    assert (blocks[0][0], blocks[-1][1]) == (0, rows)
    for start, stop in blocks:
        assert {start, stop} <= common
        assert (stop - start) * 12 <= limit or not any(start < edge < stop for edge in common)


class _Index:
    """As much of a reader as `row_blocks` looks at."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.manifest = self
        self.index = {"weight": entries}


@pytest.mark.parametrize("kind", MODELS)
def test_exports_load_in_transformers(tmp_path: Path, kind: str) -> None:
    """And give the same logits; a sharded one, too."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (an optional dependency)")
    model = MODELS[kind]
    run = _trained_run(tmp_path / "run", model, _random_weights(model))
    target = _export(run, tmp_path / "target", shard_bytes=10**9 if "tied" in kind else 20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    ours = Stage(model, Mesh(), select_kernels({}, golden.CPU))
    with HuggingFaceSource(target) as source:
        load_weights([ours], source)
    ids_BS = torch.randint(model.vocab_size, (2, 40))
    with torch.no_grad():
        expected = theirs(ids_BS).logits
        found = ours.logits(ours(ids_BS, ours.positions(40))).transpose(0, 1)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 2e-5
