"""The planner on Muon: its one momentum, the sharing out of its matrices, and what a step takes longer."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from megalite.config import ModelConfig, build_config
from megalite.model.cost import layer_matrices
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job
from megalite.planning.memory import rank_memory
from megalite.planning.muon_cost import muon_bytes, muon_seconds
from megalite.planning.states import rank_matrices, rank_states
from megalite.planning.step_time import least_step_seconds, step_time
from tests.support.parity import Case, build_trainer

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
SPARSE = {"experts": 8, "experts_per_token": 3, "expert_ffn_hidden_size": 32, "shared_experts": 2, "dense_layers": (0,)}
PLAIN = {
    "layers": 5,
    "hidden_size": 48,
    "ffn_hidden_size": 112,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 12,
    "vocab_size": 90,
    "max_positions": 128,
}


def job_of(fields=None, **options):
    model = ModelConfig(**PLAIN, **(fields or {}))
    values = {"seq_length": 64, "micro_batch_size": 2, "micro_batches": 8, "optimizer": "muon"} | options
    return Job(Architecture(model), DEVICES["h100"], **values)


@pytest.mark.parametrize("model", [{}, SPARSE], ids=["dense", "experts"])
def test_state_is_that_of_a_trainer(model):
    fields = {f"model.{name}": value for name, value in (PLAIN | model).items()} | {"optimizer.kind": "muon"}
    trainer = build_trainer(Case.of(fields).config(1), 0, 1)
    named = {box.name: box.shape for part in trainer.optimizer.segments for box, _ in part.pieces()}
    state = dict.fromkeys(("momentum_buffer", "exp_avg", "exp_avg_sq"), 0)
    for segment in trainer.optimizer.segments:
        for _, where in segment.pieces():
            for kind in segment.state:
                state[kind] += where.stop - where.start
    job = job_of(model, element_bytes=4)
    dense, experts = rank_matrices(job, 0)
    assert state["momentum_buffer"] == dense + experts and (experts > 0) == bool(model)
    assert rank_states(job, 0)["moments"] == pytest.approx(4 * sum(state.values()))
    for layer in range(5):
        for name, shape in layer_matrices(job.architecture.model, layer):
            assert len(shape) == 2 and name in named


@pytest.mark.parametrize("model", [{}, SPARSE], ids=["dense", "experts"])
def test_adamw_needs_nothing_of_this(model):
    job = job_of(model, optimizer="adamw")
    assert muon_seconds(job, 0) == muon_bytes(job, 0) == 0
    assert rank_states(job, 0)["moments"] > rank_states(job_of(model), 0)["moments"]
    assert step_time(job).seconds < step_time(job_of(model)).seconds


def test_ranks_share_the_work_and_experts_are_shared_among_fewer():
    alone = muon_seconds(job_of(), 0)
    assert muon_seconds(job_of(newton_schulz_steps=10), 0) > 1.8 * alone
    model = PLAIN | {"hidden_size": 4096, "head_dim": 128, "ffn_hidden_size": 11008, "heads": 32, "layers": 32}
    large = dataclasses.replace(job_of(), architecture=Architecture(ModelConfig(**model)))
    times = [muon_seconds(dataclasses.replace(large, data=size), 0) for size in (1, 8, 32)]
    assert times[0] / 9 < times[1] < times[0] / 6 and times[0] / 36 < times[2] < times[0] / 18
    piped = muon_seconds(dataclasses.replace(large, pipeline=4, micro_batches=8), 0)
    assert piped == pytest.approx(times[0] / 4, rel=0.01)
    assert times[1] < muon_seconds(dataclasses.replace(large, data=8, zero=0), 0)
    whole, split = (muon_seconds(job_of(SPARSE, data=8, expert=size), 0) for size in (1, 8))
    assert whole != split and split > 0


def test_the_bound_of_the_search_stays_below():
    for model, options in (({}, {}), (SPARSE, {"data": 4, "expert": 2}), ({}, {"pipeline": 2, "data": 2, "zero": 3})):
        job = job_of(model, **options)
        assert least_step_seconds(job) <= step_time(job).seconds * (1 + 1e-12)
        assert rank_memory(job, 0).total > 0


@pytest.mark.parametrize(
    "recipe, devices, expected",
    [("llama3-8b-64gpu", 64, 0.0034), ("llama3-8b-8gpu", 8, 0.0115), ("llama3-70b-256gpu", 256, 0.0064)],
)
def test_at_hidden_4096_a_step_takes_less_than_a_twentieth_longer(recipe, devices, expected):
    """The numbers of docs/muon.md."""
    tables = tomllib.loads((ROOT / "launch" / "recipes" / f"{recipe}.toml").read_text())
    config = build_config(tables | {"optimizer": tables["optimizer"] | {"kind": "muon"}})
    job = Job.of(config, devices, DEVICES["h100"])
    adamw = dataclasses.replace(job, optimizer="adamw")
    assert job.optimizer == "muon" and config.model.hidden_size >= 4096
    longer = step_time(job).seconds / step_time(adamw).seconds - 1
    assert longer < 0.05 and longer == pytest.approx(expected, abs=1e-4)
    assert rank_memory(job, 0).total < rank_memory(adamw, 0).total
