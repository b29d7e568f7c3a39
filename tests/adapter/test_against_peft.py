"""LoRA against PEFT on a transformers model: losses, gradients, files in both directions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.align.frozen import Reference
from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.peers import Peers
from megalite.config import Config, build_config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.objective.next_token import NextToken
from megalite.objective.preference import DPO, REFERENCE
from megalite.train.trainer import Trainer
from tests.align import peer
from tests.support.chaos import ChaosGroups
from tests.support.parity import Layout, assemble, distance, pieces_of_gradients

peft = pytest.importorskip("peft")

LENGTH, BETA, RANK, ALPHA = 64, 0.3, 4, 6.0
LAYOUTS = (
    Layout(),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2),
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True, pipeline=2),
)
SFT = peer.random_examples(16, seed=21)
PAIRS = [peer.random_examples(16, seed=22)[2 * number : 2 * number + 2] for number in range(8)]


def lora_config(rslora: bool, **fields: Any) -> Any:
    targets = fields.pop("target_modules", "all-linear")
    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM", **fields
    )


def make_adapter(base: Path, folder: Path, rslora: bool = False, **fields: Any) -> Path:
    """A PEFT adapter whose A and B are both random, as PEFT saves it."""
    model = peft.get_peft_model(peer.load(base), lora_config(rslora, **fields))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peer.make_models(tmp_path_factory.mktemp("models"))[0]


def load_peft(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(peer.load(base), str(adapter), is_trainable=True)


def config_of(base: Path, layout: Layout, kind: str, load: str = "", **sections: dict[str, Any]) -> Config:
    with HuggingFaceSource(base) as source:
        tables: dict[str, dict[str, Any]] = {"model": dataclasses.asdict(source.model)}
    for path, value in layout.fields.items():
        section, name = path.split(".")
        tables.setdefault(section, {})[name] = value
    tables["train"] = {"seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 8, "precision": "fp32"}
    tables["adapter"] = {"kind": kind, "rank": RANK, "alpha": ALPHA}
    tables["checkpoint"] = {"load": load, "load_optimizer": False}
    for section, fields in sections.items():
        tables[section] = tables.get(section, {}) | fields
    return build_config(tables)


def make_trainer(config: Config, layout: Layout, rank: int, objective: Any = None, chaos: bool = False) -> Trainer:
    sizes = {"pp": layout.pipeline, "dp": layout.data, "cp": layout.context, "tp": layout.tensor}
    mesh = Mesh(**sizes, rank=rank, **({"make_group": ChaosGroups(seed=rank + 1)} if chaos else {}))
    return Trainer(config, mesh, select_kernels({}, mesh.device), objective=objective)


def begin(trainer: Trainer, run: Path, source: Path) -> None:
    trainer.initialise_before(str(source))
    with CheckpointManager(run, trainer.config, trainer.mesh) as manager:
        manager.load(trainer, source, optimizer=False)


def batches_of(kind: str, mesh: Mesh) -> list[Batch]:
    groups = [[example] for example in SFT] if kind == "sft" else PAIRS
    rows = peer.in_rows(groups, LENGTH, 8)
    return [peer.packed([row], LENGTH) for row in rows][mesh.index("dp") :: mesh.dp]


def run_rank(rank: int, layout: Layout, base: Path, adapter: Path, kind: str, run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for objective in (NextToken(), DPO(BETA)):
        config = config_of(base, layout, kind, str(adapter))
        trainer = make_trainer(config, layout, rank, objective, chaos=True)
        name = "sft" if isinstance(objective, NextToken) else "dpo"
        begin(trainer, run / name, adapter)
        batches: Any = batches_of(name, trainer.mesh)
        if name == "dpo":
            reference = Reference(config, trainer.mesh, trainer.kernels, Peers(trainer.mesh), trainer)
            reference.prepare({})
            if scores := reference.model.score(batches):
                batches = [
                    dataclasses.replace(batch, columns={**batch.columns, REFERENCE: score[0]})
                    for batch, score in zip(batches, scores, strict=True)
                ]
        measured = trainer.measure(batches)[0]
        trainer.accumulate(batches)
        found[name] = (measured, pieces_of_gradients(trainer))
        trainer.wait_for_all_gather()
    return found


def expected(base: Path, adapter: Path) -> dict[str, tuple[float, dict[str, Tensor]]]:
    model = load_peft(base, adapter)
    found = {"sft": peer.sft(model, SFT), "dpo": peer.dpo(model, peer.load(base), PAIRS, BETA)}
    names = ("base_model.model.", ""), (".default", "")
    for name, (loss, gradients) in found.items():
        for old, new in names:
            gradients = {key.replace(old, new): value for key, value in gradients.items()}
        found[name] = loss, gradients
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_losses_and_gradients(pool: Any, base: Path, tmp_path: Path, layout: Layout) -> None:
    kind = "rslora" if layout.pipeline == 2 else "lora"
    adapter = make_adapter(base, tmp_path / "adapter", kind == "rslora")
    theirs = expected(base, adapter)
    ranks = pool.run(run_rank, layout.world, layout, base, adapter, kind, tmp_path)
    for name, (loss, gradients) in theirs.items():
        assert all(rank[name][0] == ranks[0][name][0] for rank in ranks)
        assert math.isclose(ranks[0][name][0], loss, rel_tol=1e-5)
        ours = assemble([rank[name][1] for rank in ranks], 1)
        assert ours.keys() == gradients.keys() and len(ours) == 2 * 7 * 4
        far = {key: gap for key in ours if not (gap := distance(ours[key], gradients[key])) <= 1e-5}
        assert not far
