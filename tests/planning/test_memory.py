"""Memory over a schedule: in-flight micro-batches are the schedule's own, ZeRO shares out what it should."""

import dataclasses
from collections import Counter

import pytest

from megalite.config import ModelConfig
from megalite.mesh import Mesh
from megalite.planning.activations import stage_memory
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES, link, transfer_link
from megalite.planning.job import Job
from megalite.planning.memory import rank_memory, worst_rank
from megalite.planning.stage_time import pipeline_costs
from megalite.planning.states import rank_states
from megalite.planning.step_time import step_time
from megalite.schedule.simulate import simulate

pytestmark = pytest.mark.fast


def some_job(**fields) -> Job:
    model = ModelConfig(
        layers=24, hidden_size=512, ffn_hidden_size=1408, heads=8, kv_heads=2, vocab_size=1000, max_positions=64
    )
    values = {"micro_batches": 16, "pipeline": 4, "tensor": 1, "data": 1, "zero": 1, "schedule": "1f1b"} | fields
    return Job(Architecture(model), DEVICES["h100"], seq_length=256, micro_batch_size=2, **values)


@pytest.mark.parametrize("schedule, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("interleaved", 2)])
@pytest.mark.parametrize("micro_batches", [4, 16, 100])
def test_in_flight_is_what_the_simulator_counts(schedule, chunks, micro_batches):
    job = some_job(schedule=schedule, virtual_stages=chunks, micro_batches=micro_batches)
    live = simulate(job.plan()).peak_live
    for rank in range(job.pipeline):
        memory = rank_memory(job, rank)
        assert memory.in_flight == live[rank]
        kept = [stage_memory(job, stage).kept for stage in job.stages_of(rank)]
        assert min(kept) * live[rank] <= memory.parts["activations"] <= max(kept) * live[rank] * (1 + 1e-12)


def test_postponed_weight_gradients_hold_their_inputs():
    """zb_h1 puts off rank r's weight gradients by r micro-batches; each holds its products' inputs and gradients."""
    split, whole = some_job(schedule="zb_h1"), some_job(schedule="1f1b")
    for rank in range(4):
        one, other = rank_memory(split, rank), rank_memory(whole, rank)
        backward = one.parts["activations"] - other.parts["activations"]
        assert backward == pytest.approx(rank * stage_memory(split, rank).postponed, rel=1e-9, abs=1.0)
    assert rank_memory(split, 3).total > rank_memory(whole, 3).total


def test_fp8_keeps_the_matrices_twice_in_eight_bits():
    """All of a rank's layers, or the two that ZeRO-3 has whole."""
    plain, fp8 = (some_job(pipeline=1, data=4, fp8=on) for on in (False, True))
    layer = 512 * (512 + 2 * 128) + 512 * 512 + 3 * 512 * 1408
    assert rank_states(fp8, 0) == {**rank_states(plain, 0), "fp8 weights": 2 * 24 * layer}
    assert rank_states(dataclasses.replace(fp8, zero=3), 0)["fp8 weights"] == 2 * 2 * layer


@pytest.mark.parametrize("size", [2, 4])
def test_what_zero_shares_out(size):
    states = [rank_states(some_job(data=8, pipeline=1, zero=level, element_bytes=size), 0) for level in range(4)]
    whole, optimizer, gradients, parameters = states
    elements = whole["weights"] / size
    assert optimizer["moments"] == pytest.approx(whole["moments"] / 8)
    assert optimizer["weights"] == gradients["weights"] == whole["weights"]
    assert optimizer["gradients"] == pytest.approx(4 * elements * (1 + 1 / 8))  # and the reduced shard
    assert gradients["gradients"] < optimizer["gradients"] / 2
    assert parameters["weights"] < gradients["weights"] / 2
    assert sum(sum(state.values()) for state in (parameters,)) < sum(gradients.values())


def test_alone_there_is_nothing_to_share():
    totals = {worst_rank(some_job(zero=level, pipeline=1)).total for level in range(4)}
    assert len(totals) == 1


def test_tensor_ranks_share_everything_but_the_norms():
    one, two = (worst_rank(dataclasses.replace(some_job(tensor=t, sequence=t > 1), micro_batches=4)) for t in (1, 2))
    assert two.parts["weights"] == pytest.approx(one.parts["weights"] / 2, rel=0.01)
    assert two.parts["activations"] == pytest.approx(one.parts["activations"] / 2, rel=0.01)


@pytest.mark.parametrize("tensor, data, pipeline", [(1, 8, 3), (8, 2, 2), (2, 4, 4), (4, 4, 1), (2, 3, 1), (4, 2, 3)])
def test_links_are_those_of_the_real_ranks(tensor, data, pipeline):
    """A group crosses a node's border when the ranks that the mesh gives it do; each of its ranks there has a network
    adapter."""
    device = DEVICES["h100"]
    mesh = Mesh(pp=pipeline, dp=data, tp=tensor, rank=0, make_group=lambda ranks, rank: None)  # type: ignore[arg-type]
    for axis, size, stride in (("tp", tensor, 1), ("dp", data, tensor)):
        ranks = mesh.ranks_along(axis)
        over = link(device, size, stride)
        nodes = Counter(rank // device.per_node for rank in ranks)
        assert over.crosses == (len(nodes) > 1)
        if over.crosses:
            adapters = max(nodes.values()) * device.network_bandwidth * device.network_efficiency
            assert over.bandwidth == min(adapters, device.link_bandwidth * device.link_efficiency)
    if pipeline > 1:
        here, there = mesh.ranks_along("pp")[:2]
        crosses = here // device.per_node != there // device.per_node
        assert transfer_link(device, data * tensor).crosses == crosses


@pytest.mark.parametrize("schedule, chunks", [("1f1b", 1), ("interleaved", 3), ("zb_h1", 1), ("zb_v", 2)])
@pytest.mark.parametrize("micro_batches", [8, 60])
def test_idle_is_the_simulators_mean_of_the_ranks(schedule, chunks, micro_batches):
    job = some_job(schedule=schedule, virtual_stages=chunks, micro_batches=micro_batches)
    time = step_time(job)
    simulated = simulate(job.plan(), *pipeline_costs(job))
    assert time.bubble == pytest.approx(simulated.bubble, abs=2e-3) and sum(time.parts.values()) == pytest.approx(
        time.seconds
    )
