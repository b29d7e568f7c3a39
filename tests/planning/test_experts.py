"""The planner on models with experts: parameters, active ones, memory and exchange follow the experts' ranks."""

import dataclasses

import pytest
import torch

from megalite.config import ModelConfig
from megalite.model.cost import model_sizes, parameter_count
from megalite.model.decoder import Stage
from megalite.placement import placed_parameters
from megalite.planning.activations import layer_kept
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job
from megalite.planning.states import rank_states, stage_elements
from megalite.planning.step_time import step_time
from tests.planning.saved import plain_kernels, saved_bytes, silent_mesh

pytestmark = pytest.mark.fast

MODEL = ModelConfig(
    layers=5,
    hidden_size=48,
    ffn_hidden_size=112,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab_size=90,
    max_positions=128,
    experts=8,
    experts_per_token=3,
    expert_ffn_hidden_size=32,
    shared_experts=2,
    dense_layers=(0, 3),
)


def job_of(model=MODEL, **fields):
    values = {"seq_length": 64, "micro_batch_size": 2, "micro_batches": 8, "data": 4, "zero": 1} | fields
    return Job(Architecture(model), DEVICES["h100"], **values)


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_elements_are_those_of_the_built_stages(expert):
    job = job_of(pipeline=2, expert=expert)
    for stage in range(2):
        mesh = silent_mesh(pp=2, ep=expert, rank=stage * expert)
        built = Stage(MODEL, mesh, plain_kernels(), stage=stage, owners=(0, 1))
        assert stage_elements(job, stage) == sum(parameter.numel() for parameter in placed_parameters(built))
    assert parameter_count(MODEL) == sum(stage_elements(job_of(pipeline=2), stage) for stage in range(2))


def test_active_parameters_are_those_a_token_uses():
    """Attention, router, the chosen and the shared experts or the dense network, and the output layer."""
    attention = 48 * (64 + 2 * 32) + 64 * 48
    sparse = attention + 8 * 48 + 3 * (3 + 2) * 48 * 32
    dense = attention + 3 * 48 * 112
    assert model_sizes(MODEL).matmul_parameters(MODEL) == 3 * sparse + 2 * dense + 90 * 48


def test_splitting_experts_divides_their_states_alone():
    """Weights fall by the experts' share; the optimizer's, sharded over all data ranks anyway, stay what they were."""
    whole, split = (rank_states(job_of(expert=expert), 0) for expert in (1, 4))
    experts = 3 * 8 * 3 * 48 * 32
    assert whole["weights"] - split["weights"] == pytest.approx(2 * experts * 3 / 4)
    assert split["moments"] == pytest.approx(whole["moments"])


def test_rows_travel_only_where_experts_are_split():
    parts = {expert: step_time(job_of(expert=expert)).parts["rows on their way to experts"] for expert in (1, 2, 4)}
    assert parts[1] == 0 < parts[2] < parts[4]
    unshared = dataclasses.replace(MODEL, shared_experts=0)
    assert step_time(job_of(unshared, expert=4)).parts["rows on their way to experts"] >= parts[4]


@pytest.mark.parametrize("size", [2, 4])
def test_a_sparse_layer_keeps_about_what_autograd_saves(size):
    model = dataclasses.replace(MODEL, dense_layers=(), hidden_size=64, layers=3)
    job = dataclasses.replace(job_of(model, element_bytes=size, data=1), device=DEVICES["cpu"])
    dtype = torch.bfloat16 if size == 2 else torch.float32
    tokens = (job.seq_length, job.micro_batch_size)
    mesh = silent_mesh(torch.device("cpu"))
    saved = saved_bytes(model, mesh, plain_kernels(), tokens=tokens, recompute="none", dtype=dtype)
    orders = 16.0 * job.tokens * model.experts_per_token  # held, but not by autograd
    assert saved == pytest.approx(layer_kept(job) - orders, rel=0.1)
