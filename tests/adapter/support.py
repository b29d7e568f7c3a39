"""What the tests of adapters share. Nothing here imports PEFT before it is used: workers do without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

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
from tests.checkpoint.support import Pieces, held
from tests.support.chaos import ChaosGroups
from tests.support.parity import Layout, pieces_of_gradients

LENGTH, BETA, RANK, ALPHA = 64, 0.3, 4, 6.0
SFT = peer.random_examples(16, seed=21)
PAIRS = [peer.random_examples(16, seed=22)[2 * number : 2 * number + 2] for number in range(8)]


# PEFT


def lora_config(rslora: bool, **fields: Any) -> Any:
    import peft

    targets = fields.pop("target_modules", "all-linear")
    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM", **fields
    )


def make_adapter(base: Path, folder: Path, rslora: bool = False, **fields: Any) -> Path:
    """A PEFT adapter whose A and B are both random, as PEFT saves it."""
    import peft

    model = peft.get_peft_model(peer.load(base), lora_config(rslora, **fields))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def load_peft(base: Path, adapter: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(peer.load(base), str(adapter), is_trainable=True)


# Ours


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


def steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        assert trainer.step(batches_of("sft", trainer.mesh), 1e-2).accepted


def train_and_save(rank: int, layout: Layout, source: Path, run: Path) -> tuple[Pieces, Pieces, Pieces]:
    """The state before training, at the checkpoint of step 2, and two steps later."""
    config = config_of(source, layout, "lora", str(source))
    trainer = make_trainer(config, layout, rank)
    begin(trainer, run, source)
    before = held(trainer)
    with CheckpointManager(run, config, trainer.mesh) as manager:
        steps(trainer, 2)
        manager.save(trainer, {"step": 2})
        assert manager.wait()
    saved = held(trainer)
    steps(trainer, 2)
    return before, saved, held(trainer)


def resume(rank: int, layout: Layout, source: Path, run: Path, more: int) -> Pieces:
    config = config_of(source, layout, "lora", str(source))
    trainer = make_trainer(config, layout, rank)
    with CheckpointManager(run, config, trainer.mesh) as manager:
        assert manager.load_latest(trainer) == {"step": 2}
    steps(trainer, more)
    return held(trainer)
