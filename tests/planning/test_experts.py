"""The planner on models with experts: parameters, active ones, memory and exchange follow the experts' ranks."""

import dataclasses
import tomllib

import pytest
import torch
from rich.console import Console

from megalite.config import ModelConfig
from megalite.model.cost import model_sizes, parameter_count
from megalite.model.decoder import Stage
from megalite.model.partition import layers_of_stage
from megalite.placement import placed_parameters
from megalite.planning.activations import layer_kept
from megalite.planning.alignment import rollout_bytes, token_seconds
from megalite.planning.architecture import Architecture
from megalite.planning.estimate import Plan
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job, Rollout
from megalite.planning.memory import rank_memory
from megalite.planning.search import Ranking
from megalite.planning.states import rank_shares, rank_states, stage_elements
from megalite.planning.step_time import step_time
from megalite.planning.tables import layout_words, overrides_toml, ranking_table
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


ROLLOUT = Rollout(answers=6, batch=6, prompt=40, tokens=24, epochs=1, minibatches=1)
EXPERTS = 3 * 8 * 3 * 48 * 32
"""Elements of all experts of the three sparse layers."""


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_the_optimizer_gathers_the_shards_of_those_that_hold_the_same(expert):
    """Wide experts and few tokens: the gathering is the worst moment."""
    model = dataclasses.replace(MODEL, expert_ffn_hidden_size=4096, shared_experts=0)
    job = job_of(model, expert=expert, seq_length=8, micro_batch_size=1)
    memory = rank_memory(job, 0)
    experts = EXPERTS * 128 // expert
    rest = stage_elements(job, 0) - experts
    assert rank_shares(job, 0) == ((rest, 4), (experts, 4 // expert))
    if expert < 4:
        gathered = rest / 4 + experts * expert / 4
        assert memory.moment == "optimizer's step" and memory.parts["layer at work"] == pytest.approx(2 * gathered)
    else:  # every expert is on one rank alone
        assert memory.moment != "optimizer's step"


def test_a_rollout_gathers_no_experts_that_one_rank_holds_alone():
    whole, alone = (job_of(expert=expert, zero=3, rollout=ROLLOUT) for expert in (1, 4))
    rest = stage_elements(whole, 0) - EXPERTS
    assert rollout_bytes(whole, 0)["whole weights"] == 2 * (rest + EXPERTS)
    assert rollout_bytes(alone, 0)["whole weights"] == 2 * rest


def test_a_rollout_goes_through_layers_of_both_kinds():
    sparse = dataclasses.replace(MODEL, dense_layers=(), ffn_hidden_size=4096)
    dense = dataclasses.replace(sparse, experts=0, shared_experts=0)
    mixed = dataclasses.replace(sparse, dense_layers=(0, 3))
    device = dataclasses.replace(DEVICES["h100"], layer_overhead=0.0)
    jobs = [dataclasses.replace(job_of(model, rollout=ROLLOUT), device=device) for model in (sparse, dense, mixed)]
    seconds = [token_seconds(job, ROLLOUT) for job in jobs]
    assert seconds[2] == pytest.approx((3 * seconds[0] + 2 * seconds[1]) / 5)
    assert seconds[2] != pytest.approx(seconds[0], rel=1e-3)
    work = [rollout_bytes(job, 0)["rollout at work"] for job in jobs]
    assert work[2] == work[1] == 6 * 40 * 2 * 3 * (48 + 4096) and work[0] < work[1]


def test_a_written_token_is_multiplied_with_the_experts_it_uses():
    """On a device that computes slowly and reads at once."""
    device = dataclasses.replace(DEVICES["cpu"], layer_overhead=0.0, memory_bandwidth=float("inf"))
    models = [dataclasses.replace(MODEL, experts_per_token=used) for used in (2, 4)]
    jobs = [dataclasses.replace(job_of(model, rollout=ROLLOUT), device=device, element_bytes=4) for model in models]
    few, many = (token_seconds(job, ROLLOUT) for job in jobs)
    assert many - few == pytest.approx(2 * 6 * 3 * 2 * 3 * 48 * 32 / device.fp32_flops)


def test_ranks_of_a_sequence_stand_between_those_that_share_experts():
    """Four shares of the experts, each four ranks from the next, do not fit into a node of eight."""
    slow = dataclasses.replace(DEVICES["h100"], network_bandwidth=1e9)
    name = "rows on their way to experts"
    for context, crosses in ((1, False), (4, True)):
        job = job_of(expert=4, context=context)
        near, far = (step_time(dataclasses.replace(job, device=device)).parts[name] for device in (job.device, slow))
        assert (far > near) is crosses and near > 0


def test_layers_alike_are_one_kind():
    dense = job_of(dataclasses.replace(MODEL, experts=0, shared_experts=0, dense_layers=()))
    assert dense.kinds(0) == ((dense, 5),) and "_for_dense" not in vars(dense)
    assert [(kind.dense, count) for kind, count in job_of().kinds(0)] == [(False, 3), (True, 2)]
    assert layers_of_stage(MODEL, 2, 1) is layers_of_stage(MODEL, 2, 1)


@pytest.mark.parametrize("expert", [1, 2])
def test_a_layout_found_tells_its_experts(expert):
    job = job_of(expert=expert)
    plan = Plan(job, 1e9, None, rank_memory(job, 0), step_time(job))
    assert tomllib.loads(overrides_toml(job))["parallel"]["expert"] == expert
    assert ("experts over 2" in layout_words(job)) is (expert == 2)
    console = Console(width=200)
    with console.capture() as said:
        console.print(ranking_table(Ranking((plan,), 0, 0, 1)))
    assert (" ep " in said.get()) is (expert == 2)
    dense = job_of(dataclasses.replace(MODEL, experts=0, shared_experts=0, dense_layers=()))
    assert "expert" not in overrides_toml(dense)
