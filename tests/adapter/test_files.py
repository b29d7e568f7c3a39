"""An adapter's checkpoints: alone and small, resumed to the bit, merged, to PEFT and back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.huggingface.adapter_export import export_adapter
from megalite.checkpoint.huggingface.export import export_huggingface
from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.merge_adapter import merge_adapter
from megalite.checkpoint.source import CheckpointReader, fill_model
from megalite.checkpoint.weights import open_weights
from megalite.config import Config
from megalite.errors import UserError
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from tests.adapter.support import (
    RANK,
    begin,
    config_of,
    load_peft,
    make_adapter,
    make_trainer,
    resume,
    steps,
    train_and_save,
)
from tests.align import peer
from tests.checkpoint.support import assemble
from tests.fixtures import golden
from tests.support.parity import Layout

pytest.importorskip("peft")

FROM, TO = Layout(tensor=2, sequence=True, data=2, zero=3), Layout(pipeline=2, schedule="zb_h1", data=2, zero=2)


IDS = torch.randint(53, (2, 20), generator=torch.Generator().manual_seed(4))


def assert_same(ours: dict[Any, Tensor], theirs: dict[Any, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_saved_alone_and_resumed_to_the_bit(pool: Any, base: Path, tmp_path: Path) -> None:
    ranks = pool.run(train_and_save, FROM.world, FROM, base, tmp_path / "run")
    before, saved, after = (assemble([rank[moment] for rank in ranks]) for moment in range(3))
    for (kind, name), values in before.items():
        if "lora_" not in name:
            assert kind == "parameter" and torch.equal(values, after[kind, name]), name
        elif kind in ("parameter", "weight"):
            assert not torch.equal(values, after[kind, name]), name
    with CheckpointReader(tmp_path / "run") as reader:
        assert all("lora_" in name for name in reader.shapes()) and len(reader.shapes()) == 2 * 7 * 4
        assert set(reader.manifest.index) == {"weight", "exp_avg", "exp_avg_sq"}
        assert reader.manifest.bases[""]["source"] == str(base)
    assert_same(assemble(pool.run(resume, FROM.world, FROM, base, tmp_path / "run", 2)), after)
    assert_same(assemble(pool.run(resume, TO.world, TO, base, tmp_path / "run", 0)), saved)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train_and_save(0, Layout(), base, run)
    return run


def logits_of(config: Config, source: Any) -> Tensor:
    mesh = Mesh()
    model = ShardedModel(config, mesh, select_kernels({"default": "reference"}, mesh.device), trained=False)
    fill_model(model, source)
    stage = model.stages[0]
    with torch.no_grad():
        return stage.logits(stage(IDS, stage.positions(IDS.shape[1]))).transpose(0, 1)


def theirs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_merged_and_peft_have_the_same_logits(base: Path, trained: Path, tmp_path: Path) -> None:
    with open_weights(trained) as source:
        unmerged = logits_of(config_of(base, Layout(), "lora"), source.beside())
    plain = config_of(base, Layout(), "none")
    merge_adapter(trained, tmp_path / "merged")
    with CheckpointReader(tmp_path / "merged") as reader:
        merged = logits_of(plain, reader)
        export_huggingface(reader, tmp_path / "whole")
    with CheckpointReader(trained) as reader:
        export_adapter(reader, tmp_path / "peft")
    assert (merged - unmerged).abs().max() < 1e-5
    assert (theirs(peer.load(tmp_path / "whole")) - unmerged).abs().max() < 1e-5
    assert (theirs(load_peft(base, tmp_path / "peft")) - unmerged).abs().max() < 1e-5
    assert (theirs(peer.load(base)) - unmerged).abs().max() > 1e-3
    with open_weights(tmp_path / "peft") as source:
        back = logits_of(config_of(base, Layout(), "lora"), source.beside())
    assert torch.equal(back, unmerged)
    with pytest.raises(UserError, match="holds no adapter apart from its base"):
        merge_adapter(tmp_path / "merged", tmp_path / "again")


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_merged_and_loaded(base: Path, tmp_path: Path, rslora: bool) -> None:
    adapter = make_adapter(base, tmp_path / "peft", rslora, target_modules=["q_proj", "down_proj"])
    expected = theirs(load_peft(base, adapter))
    merge_adapter(adapter, tmp_path / "merged")
    with CheckpointReader(tmp_path / "merged") as reader:
        assert (logits_of(config_of(base, Layout(), "none"), reader) - expected).abs().max() < 1e-5
    fields = {"targets": ["down_proj", "q_proj"]}
    config = config_of(base, Layout(), "rslora" if rslora else "lora", str(adapter), adapter=fields)
    trainer = make_trainer(config, Layout(), 0)
    begin(trainer, tmp_path / "own", adapter)
    stage = trainer.stages[0]
    with torch.no_grad():
        ours = stage.logits(stage(IDS, stage.positions(IDS.shape[1]))).transpose(0, 1)
    assert (ours - expected).abs().max() < 1e-5


def test_an_imported_base_merges_in_its_own_dtype(base: Path, tmp_path: Path) -> None:
    peer.load(base).bfloat16().save_pretrained(tmp_path / "bf16")
    import_huggingface(tmp_path / "bf16", tmp_path / "imported")
    run = tmp_path / "run"
    config = config_of(base, Layout(), "lora", str(tmp_path / "imported"))
    trainer = make_trainer(config, Layout(), 0)
    begin(trainer, run, tmp_path / "imported")
    steps(trainer, 2)
    with CheckpointManager(run, config, trainer.mesh) as manager:
        manager.save(trainer, {"step": 2})
        assert manager.wait()
    merge_adapter(run, tmp_path / "merged")
    with CheckpointReader(tmp_path / "merged") as merged, CheckpointReader(tmp_path / "imported") as before:
        assert {entry.dtype for entry in merged.manifest.index["weight"].values()} == {"BF16"}
        changed = {
            name
            for name, shape in before.shapes().items()
            if not torch.equal(before.read(name, (0,) * len(shape), shape), merged.read(name, (0,) * len(shape), shape))
        }
        export_huggingface(merged, tmp_path / "back")
    assert len(changed) == 7 * 4 and all("_proj" in name for name in changed)
    kept, back = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "bf16", tmp_path / "back"))
    assert kept == back


# What is refused


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_model_name_or_path": "meta-llama/Llama-3"}, "base_model_name_or_path = 'meta-llama/Llama-3' is not"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern = {'q_proj': 3} is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' has changed the base"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'; megalite reads LORA"),
        ({"r": 0}, "r = 0 is not a rank"),
        ({"r": 3}, r"lora_A.weight has shape \[4, \d+\], its base .* needs \[3, \d+\]"),
    ],
)
def test_peft_directories_that_are_refused(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapter = edit(make_adapter(base, tmp_path / "peft"), **change)
    with pytest.raises(UserError, match=message) as raised:
        merge_adapter(adapter, tmp_path / "merged")
    assert "\n" not in str(raised.value) and not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, fields in (("wide", {"hidden_size": 32}), ("short", {"num_hidden_layers": 3})):
        LlamaForCausalLM(LlamaConfig(**(peer.SHAPE | fields))).save_pretrained(tmp_path / name)
    adapter = make_adapter(base, tmp_path / "peft")
    for name, message in (("wide", r"has shape .*, its base"), ("short", "layers.3.* belongs to no weight of")):
        edit(adapter, base_model_name_or_path=str(tmp_path / name))
        with pytest.raises(UserError, match=message):
            merge_adapter(adapter, tmp_path / "merged")


def refusal(config: Config, source: Path, run: Path) -> str:
    with pytest.raises(UserError) as raised:
        begin(make_trainer(config, Layout(), 0), run, source)
    return str(raised.value)


def test_wrong_adapters_and_targets(base: Path, trained: Path, tmp_path: Path) -> None:
    def said(source: Path = trained, **fields: Any) -> str:
        config = config_of(base, Layout(), "lora", str(source), adapter=fields)
        return refusal(config, source, tmp_path / "run")

    assert said(targets=["q_proj", "query"]) == (
        "adapter.targets names 'query', and no layer that takes an adapter is called so; use some of "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )
    assert "adapter.rank = 25 exceeds the 24 features of q_proj" in said(rank=25)
    assert f"has adapter.rank = {RANK}, and it is now 3; use the former" in said(rank=3)
    assert "has adapter.alpha = 6.0, and it is now 7.0" in said(alpha=7.0)
    assert "has adapter.kind = 'lora', and it is now 'rslora'" in said(kind="rslora")
    assert "is not part of the adapter of the configuration" in said(targets=["q_proj"])
    with pytest.raises(UserError, match=r"adapter\.rank = 0"):
        config_of(base, Layout(), "lora", adapter={"rank": 0})


def test_a_run_does_not_go_on_without_its_base(base: Path, tmp_path: Path) -> None:
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(base, copy)
    train_and_save(0, Layout(), copy, run)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    with pytest.raises(UserError, match="is not the model with which this run began; restore that one"):
        resume(0, Layout(), copy, run, 0)
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=r"needs the weights of .*, which is not there; restore it"):
        merge_adapter(run, tmp_path / "merged")


def test_an_adapter_beside_fused_weights_is_not_exported(tmp_path: Path) -> None:
    """Phi-3's files have one tensor for q, k and v, beside which PEFT would put one adapter: not what was trained."""
    base = golden.folder("phi3_fused")
    train_and_save(0, Layout(), base, tmp_path / "run")
    refused = pytest.raises(UserError, match=r"Phi3ForCausalLM has no weight of its own for .*; merge the adapter")
    with CheckpointReader(tmp_path / "run") as reader, refused:
        export_adapter(reader, tmp_path / "out")
    assert not (tmp_path / "out").exists()
