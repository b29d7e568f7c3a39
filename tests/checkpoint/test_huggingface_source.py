"""Hugging Face directories as a source of weights: every box, every layout, and nothing believed unchecked."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface.names import HuggingFaceSource, is_huggingface
from megalite.checkpoint.source import compare_shapes, load_weights
from megalite.errors import UserError
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.decoder import Stage
from megalite.model.shapes import model_shapes
from megalite.placement import placed_parameters
from tests.fixtures import golden

pytestmark = pytest.mark.fast
NAME = "llama3_gqa"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a fixture, to damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(golden.folder(NAME) / file, copy / file)
    return copy


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    places = {name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _rewrite_index(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_box(folder: Path, dtype: torch.dtype) -> None:
    """Random boxes of one and two dimensions, bit for bit, in the dtype they are stored in."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    random = np.random.default_rng()
    with HuggingFaceSource(folder) as source:
        assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            offset = [int(random.integers(extent)) for extent in tensor.shape]
            size = [int(random.integers(1, extent - start + 1)) for start, extent in zip(offset, tensor.shape)]
            box = source.read(name, offset, size)
            expected = tensor[tuple(slice(start, start + length) for start, length in zip(offset, size))]
            assert box.dtype == dtype
            assert torch.equal(box, expected)


def test_large_boxes_are_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.checkpoint.huggingface.names._CHUNK_BYTES", 1000)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = load_file(folder / "model.safetensors")[name]
    with HuggingFaceSource(folder) as source:
        assert torch.equal(source.read(name, (3, 11), (40, 50)), expected[3:43, 11:61])


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_shapes_of_the_model_are_those_of_the_file(name: str) -> None:
    with HuggingFaceSource(golden.folder(name)) as source:
        compare_shapes(model_shapes(source.model), source.shapes(), name)


@pytest.mark.parametrize("layout", [{"tp": 2, "rank": 1}, {"pp": 2, "rank": 1}, {"tp": 2, "pp": 3, "rank": 4}], ids=str)
def test_a_rank_of_any_layout(sharded: Path, layout: dict[str, int]) -> None:
    """Fused and split parameters get the values of their boxes; shards make no difference; padding is zero."""
    tensors = load_file(golden.folder(NAME) / "model.safetensors")
    mesh = Mesh(**layout, make_group=lambda ranks, rank: _NoGroup(ranks, rank))  # type: ignore[arg-type,return-value]
    with HuggingFaceSource(sharded) as source:
        kernels = select_kernels({}, golden.CPU)
        stage = Stage(source.model, mesh, kernels, stage=mesh.index("pp"), owners=range(mesh.pp))
        load_weights([stage], source)
    for parameter in placed_parameters(stage):
        covered = torch.zeros_like(parameter)
        for box in parameter.placement.boxes:
            assert torch.equal(box.view(parameter), box.of(tensors[box.name]))
            box.view(covered).fill_(1)
        assert torch.equal(parameter * covered, parameter)


class _NoGroup:
    """A group to build a model with: it is never spoken over."""

    def __init__(self, ranks: tuple[int, ...], rank: int) -> None:
        self.ranks, self.index, self.size = ranks, ranks.index(rank), len(ranks)


def _cut(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


def _set_header_length(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def _set_header(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda folder: _cut(folder, 0), r"model\.safetensors has 0 bytes"),
    "truncated header": (lambda folder: _cut(folder, 500), r"model\.safetensors: the header claims \d+ bytes"),
    "truncated data": (lambda folder: _cut(folder, 100_000), r"model\.safetensors: tensor .* truncated"),
    "huge header": (lambda folder: _set_header_length(folder, 1 << 62), r"header claims 4611686018427387904 bytes"),
    "no JSON": (lambda folder: _set_header_length(folder, 77), r"model\.safetensors is not valid JSON"),
    "wrong dtype": (
        lambda folder: _set_header(folder, lambda header: header[NORM].update(dtype="I64")),
        r"model\.safetensors: tensor 'model\.norm\.weight' has dtype 'I64'; readable are F32, BF16, F16",
    ),
    "huge shape": (
        lambda folder: _set_header(folder, lambda header: header[NORM].update(shape=[1 << 40])),
        r"model\.safetensors: tensor 'model\.norm\.weight' has \d+ bytes where its shape needs",
    ),
    "negative offset": (
        lambda folder: _set_header(folder, lambda header: header[NORM].update(data_offsets=[-8, 0])),
        r"model\.safetensors: tensor 'model\.norm\.weight' has an impossible shape or byte range",
    ),
    "missing tensor": (
        lambda folder: _set_header(folder, lambda header: header.pop(NORM)),
        r"model does not fit the model: model\.norm\.weight is missing",
    ),
    "other shape": (
        lambda folder: _set_header(folder, lambda header: header[NORM].update(shape=[6, 8])),
        r"model\.norm\.weight has shape \[6, 8\], the model needs \[48\]",
    ),
    "foreign tensor": (
        lambda folder: _set_header(folder, lambda header: header.update(extra=header[NORM])),
        r"extra is not part of the model",
    ),
    "only pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"\.bin files are pickle, which is never loaded",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights; needed is model\.safe"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: No such file"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
}

INDEX_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "path traversal": (
        lambda folder: _rewrite_index(folder, lambda index: index["weight_map"].update({NORM: "../x.safetensors"})),
        r"index\.json: tensor 'model\.norm\.weight' is put in '\.\./x\.safetensors', which is not a plain",
    ),
    "absolute path": (
        lambda folder: _rewrite_index(folder, lambda index: index["weight_map"].update({NORM: "/etc/x.safetensors"})),
        r"is put in '/etc/x\.safetensors', which is not a plain",
    ),
    "not a file name": (
        lambda folder: _rewrite_index(folder, lambda index: index["weight_map"].update({NORM: 7})),
        r"is put in 7, which is not a plain",
    ),
    "no map": (
        lambda folder: _rewrite_index(folder, lambda index: index.pop("weight_map")),
        r"index\.json has no weight_map",
    ),
    "missing shard": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        r"model-00002-of-00003\.safetensors is missing, though model\.safetensors\.index\.json names it",
    ),
    "tensor in another shard": (
        lambda folder: _rewrite_index(
            folder,
            lambda index: index["weight_map"].update(
                dict.fromkeys(index["weight_map"], "model-00001-of-00003.safetensors")
            ),
        ),
        r"model-00001-of-00003\.safetensors has no tensor",
    ),
}


def _assert_refused(folder: Path, message: str) -> None:
    """One clear error for conversion, and nothing left behind."""
    target = folder.parent / "run"
    with pytest.raises(UserError, match=message) as raised:
        import_huggingface(folder, target)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(folder: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(folder)
    _assert_refused(folder, message)


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_damaged_indices(sharded: Path, damage: str) -> None:
    harm, message = INDEX_DAMAGES[damage]
    harm(sharded)
    _assert_refused(sharded, message)


def test_redundant_tensors_are_left_out(tmp_path: Path) -> None:
    """The output layer of a tied model, saved a second time, and the rotary frequencies of old exports."""
    shutil.copytree(golden.folder("llama_tied_mha"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(tensors | extra, tmp_path / "model" / "model.safetensors")
    with HuggingFaceSource(tmp_path / "model") as source:
        assert source.shapes() == model_shapes(source.model)


def test_what_is_a_huggingface_directory(folder: Path, tmp_path: Path) -> None:
    assert is_huggingface(folder)
    assert not is_huggingface(tmp_path)
    assert not is_huggingface(tmp_path / "nothing")
    (folder / "manifest.json").write_text("{}")
    assert not is_huggingface(folder)
