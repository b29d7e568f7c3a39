"""`checkpoint.load` takes a Hugging Face directory as it lies, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.manager import CheckpointManager
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.trainer import Trainer
from tests.fixtures import golden
from tests.support.chaos import ChaosGroups
from tests.support.pool import Pool

NAME = "llama3_gqa"


def _load(rank: int, folder: str, source: str, **parallel: Any) -> list[str]:
    """Start from `source`; the names of the parts that differ from the file, and the loss of a first step."""
    with HuggingFaceSource(golden.folder(NAME)) as original:
        config = golden.training_config(original.model, **parallel)
    groups = ChaosGroups(seed=rank)
    mesh = Mesh(pp=config.parallel.pipeline, dp=2, tp=config.parallel.tensor, rank=rank, make_group=groups)
    trainer = Trainer(config, mesh, select_kernels({}, golden.CPU))
    with CheckpointManager(folder, config, mesh) as manager:
        assert manager.load(trainer, source) == {}
    groups.verify()  # nothing is under way: the parameters can be read
    tensors, wrong = load_file(golden.folder(NAME) / "model.safetensors"), []
    for segment in trainer.optimizer.segments:
        for box, where in segment.pieces():
            if not torch.equal(segment.master.detach()[where].view(box.size), box.of(tensors[box.name])):
                wrong.append(f"master of {box.name} at {box.offset}")
    for stage in trainer.stages.values():
        for parameter in stage.parameters():
            for box in parameter.placement.boxes:
                if not torch.equal(box.view(parameter), box.of(tensors[box.name])):
                    wrong.append(f"{box.name} at {box.offset}")
    return wrong


@pytest.mark.parametrize("imported", [False, True], ids=["directory", "imported run"])
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2, "zero": 0}], ids=str)
def test_weights_in_any_layout(pool: Pool, tmp_path: Path, parallel: dict[str, int], imported: bool) -> None:
    """Parameters and this rank's master weights, with two data-parallel ranks, are those of the file."""
    source = golden.folder(NAME)
    if imported:
        source = tmp_path / "imported"
        import_huggingface(golden.folder(NAME), source)
    for wrong in pool.run(_load_kwargs, 4, str(tmp_path / "run"), str(source), parallel):
        assert wrong == []


def _load_kwargs(rank: int, folder: str, source: str, parallel: dict[str, Any]) -> list[str]:
    return _load(rank, folder, source, **parallel)
