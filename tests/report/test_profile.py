"""Profiles name the pipeline's operations; memory that ran out is explained by what the rank holds."""

import json

import pytest
import torch

from megalite.config import build_config
from megalite.errors import FAULT, FINISHED
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.train.__main__ import main
from megalite.train.oom import held_bytes, is_out_of_memory, planned_bytes
from megalite.train.trainer import Trainer
from tests.support.tiny import MODEL, write_recipe


@pytest.fixture
def arguments(tmp_path):
    return [str(write_recipe(tmp_path, train={"steps": 4, "global_batch_size": 2}))]


@pytest.mark.fast
def test_a_profile_names_the_operations(arguments, tmp_path):
    assert main([*arguments, "--train.profile", "[2, 3]"]) == FINISHED
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in traces] == ["step_00000002_rank_00000.json", "step_00000003_rank_00000.json"]
    names = {event.get("name") for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert {"data", "0F0", "0B0", "0F1", "0B1", "0R"} <= names


@pytest.mark.fast
def test_memory_that_runs_out_is_explained(arguments, tmp_path, monkeypatch, capsys):
    real = Trainer.step

    def greedy(self, *step, **more):
        if self.optimizer.step_count == 2:
            torch.empty(1 << 58, dtype=torch.uint8)
        return real(self, *step, **more)

    monkeypatch.setattr(Trainer, "step", greedy)
    assert main(arguments) == FAULT
    log = (tmp_path / "run" / "log" / "rank_00000.log").read_text()
    assert "rank 0: memory ran out" in log and "train.recompute = none to selective or full" in log
    for part in ("parameters", "gradients", "optimizer", "planned"):
        assert f"  {part}" in log, part
    assert "error: rank 0: RuntimeError" in capsys.readouterr().err


@pytest.mark.fast
@pytest.mark.parametrize("tied", [False, True])
def test_held_bytes_are_those_of_the_tensors(tied):
    config = build_config(
        {
            "model": MODEL | {"tie_embeddings": tied},
            "train": {"seq_length": 16, "global_batch_size": 2, "precision": "bf16"},
        }
    )
    trainer = Trainer(config, Mesh(), select_kernels({}, torch.device("cpu")))
    trainer.initialise()
    held = held_bytes(trainer)
    elements = sum({p.data_ptr(): p.numel() for s in trainer.stages.values() for p in s.parameters()}.values())
    assert 2 * elements <= held["parameters"] < 2 * elements * 1.1  # bf16, and the padding of the buckets
    assert 4 * elements <= held["gradients"] < 4 * elements * (1.1 if not tied else 1.4)
    assert 12 * elements <= held["optimizer"] < 12 * elements * 1.1  # fp32 master weights and two moments
    assert sum(planned_bytes(config, Mesh()).values()) > 18 * elements


@pytest.mark.fast
def test_what_counts_as_running_out():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match")) and not is_out_of_memory(ValueError())


@pytest.mark.gpu
def test_a_snapshot_is_left_on_a_gpu(tmp_path):
    from megalite.train.oom import explain_memory, record_allocations

    config = build_config({"model": MODEL, "train": {"seq_length": 16, "global_batch_size": 2}})
    mesh = Mesh(device=torch.device("cuda", 0))
    record_allocations(mesh.device, True)
    trainer = Trainer(config, mesh, select_kernels({}, mesh.device))
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(1 << 50, dtype=torch.uint8, device=mesh.device)
    explain_memory(error.value, config, mesh, trainer, tmp_path / "profile")
    record_allocations(mesh.device, False)
    assert (tmp_path / "profile" / "memory_rank_00000.pickle").stat().st_size > 1000
