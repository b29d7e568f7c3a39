"""What the planner counts of a run that trains an adapter alone."""

from __future__ import annotations

import pytest

from megalite.config import build_config
from megalite.errors import UserError
from megalite.model.cost import training_flops_per_token
from megalite.model.sharded import ShardedModel
from megalite.planning.alignment import bytes_beside
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job
from megalite.planning.stage_time import gather_parameters, layer_work, reduce_gradients
from megalite.planning.states import adapter_elements, rank_states, stage_elements
from tests.planning.saved import META, plain_kernels, silent_mesh

pytestmark = pytest.mark.fast

MODEL = {
    "layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "heads": 4,
    "kv_heads": 2,
    "vocab_size": 90,
    "max_positions": 32,
}


def config_of(world: int = 1, kind: str = "lora", **sections: dict) -> object:
    tables = {
        "model": MODEL,
        "adapter": {"kind": kind, "rank": 6},
        "train": {"seq_length": 32, "global_batch_size": 8, "precision": "bf16"},
    }
    for name, fields in sections.items():
        tables[name] = tables.get(name, {}) | fields
    return build_config(tables)


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 2), (4, 1)])
def test_what_is_trained_is_what_the_model_trains(tensor: int, pipeline: int, targets: tuple[str, ...]) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline}
    config = config_of(parallel=parallel, adapter={"targets": list(targets)})
    job = Job.of(config, tensor * pipeline, DEVICES["h100"])
    for stage in range(pipeline):
        mesh = silent_mesh(META, pp=pipeline, tp=tensor, rank=stage * tensor)
        model = ShardedModel(config, mesh, plain_kernels())
        elements = {True: 0, False: 0}
        for segment in model.segments:
            elements[segment.bucket.trained] += sum(slot.parameter.numel() for slot in segment.bucket.slots)
        assert adapter_elements(job, stage) == elements[True] > 0
        assert stage_elements(job, stage) == sum(elements.values())


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_states_and_communication_are_the_adapters(zero: int) -> None:
    plain, lora = (
        Job.of(config_of(kind=kind, parallel={"zero": zero}), 4, DEVICES["h100"]) for kind in ("none", "lora")
    )
    trained, everything = adapter_elements(lora, 0), stage_elements(lora, 0)
    states = rank_states(lora, 0, working=False)
    assert states["weights"] == 2 * everything / (4 if zero == 3 else 1)
    assert states["moments"] == 8 * trained / (4 if zero else 1)
    assert states["master weights"] == 4 * trained / (4 if zero else 1)
    assert states["gradients"] == 4 * trained / (4 if zero > 1 else 1) + (trained if zero == 1 else 0)
    assert reduce_gradients(lora, 0) < reduce_gradients(plain, 0)
    assert gather_parameters(lora, 0, trained=True) < gather_parameters(lora, 0)


def test_flops_and_time_leave_out_gradients_of_frozen_weights() -> None:
    config = config_of()
    job, plain = Job.of(config, 1, DEVICES["h100"]), Job.of(config_of(kind="none"), 1, DEVICES["h100"])
    sizes = job.architecture.sizes()
    matrices, adapter = sizes.matmul_parameters(config.model), sizes.adapter_parameters(config.model)
    attention = training_flops_per_token(config.model, 32) - 6 * matrices
    expected = 4 * matrices + 6 * adapter + attention
    assert training_flops_per_token(config.model, 32, adapter=config.adapter) == expected
    assert adapter == 4 * 6 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 80))  # q and o, k and v, the three of SwiGLU
    ours, theirs = layer_work(job), layer_work(plain)
    assert ours.forward.products > theirs.forward.products
    assert ours.weight_gradient.products == ours.forward.products - theirs.forward.products


def test_the_reference_of_a_policy_takes_no_memory() -> None:
    def reference(kind: str, named: str = "") -> bool:
        config = config_of(kind=kind, objective={"kind": "dpo", "reference": named})
        return "reference" in bytes_beside(Job.of(config, 1, DEVICES["h100"]), 0)

    assert (reference("none"), reference("lora"), reference("lora", "elsewhere")) == (True, False, True)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.targets names 'wq'.* use some of q_proj"):
        Job.of(config_of(adapter={"targets": ["wq"]}), 1, DEVICES["h100"])
