"""Post-training in the planner: FLOPs as the trainer counts them, memory of the models beside, rollouts by hand."""

import dataclasses
import json
import sys

import pytest

from megalite.checkpoint.manager import CheckpointManager
from megalite.config import Config, build_config
from megalite.config.check import check_layout
from megalite.generation.cache import DecoderCache
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.objective.work import flops_per_token, passes_of
from megalite.planning import DEVICES, Job, estimate
from megalite.planning.alignment import bytes_beside, critic_job, forward_seconds, rollout_bytes, token_seconds
from megalite.planning.memory import rank_memory
from megalite.planning.stage_time import stage_works
from megalite.planning.states import frozen_bytes, rank_parameters
from megalite.planning.step_time import least_step_seconds, step_time
from megalite.train.start import build_task as task_of
from tests.align import tiny
from tests.support.parity import Layout
from tools.plan import main

pytestmark = pytest.mark.fast

H100 = DEVICES["h100"]
MODEL = {
    "layers": 6,
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "heads": 8,
    "kv_heads": 2,
    "vocab_size": 5000,
    "max_positions": 256,
}


def recipe(kind: str, **sections: dict[str, object]) -> Config:
    tables: dict[str, dict[str, object]] = {
        "model": dict(MODEL),
        "train": {"seq_length": 192, "micro_batch_size": 2, "steps": 3},
        "objective": {"kind": kind},
    }
    if kind in ("ppo", "grpo"):
        tables["rollout"] = {"prompts_per_step": 16, "answers": 4, "max_new_tokens": 64, "reward": "m:f"}
        tables["policy"] = {"epochs": 3, "minibatches": 2}
    else:
        tables["train"]["global_batch_size"] = 32
    for name, values in sections.items():
        tables.setdefault(name, {}).update(values)
    return build_config(tables)


def job_of(kind: str, world: int = 8, **sections: dict[str, object]) -> Job:
    config = recipe(kind, **sections)
    check_layout(config, world)
    return Job.of(config, world, H100)


# 6 layers of 512 x (512 + 2 * 128 + 512) + 3 * 512 * 1408 weights, attention over the whole square
MATRICES = 6 * (512 * (512 + 256 + 512) + 3 * 512 * 1408)
OUTPUT = 512 * 5000
ATTENTION = 12 * 6 * 512 * 192
TRAINING = 6 * (MATRICES + OUTPUT) + ATTENTION
SCALAR = 6 * (MATRICES + 512) + ATTENTION


@pytest.mark.parametrize(
    "kind, sections, expected",
    [
        ("sft", {}, TRAINING),
        ("reward", {}, SCALAR),
        ("dpo", {}, TRAINING * 4 / 3),
        ("grpo", {}, TRAINING * (3 + 3 / 3)),
        ("grpo", {"policy": {"kl": 0.0, "epochs": 1}}, TRAINING * (1 + 2 / 3)),
        ("ppo", {}, TRAINING * (3 + 3 / 3) + SCALAR * (3 + 1 / 3)),
        ("ppo", {"rollout": {"reward_model": "nowhere"}}, TRAINING * (3 + 3 / 3) + SCALAR * (3 + 2 / 3)),
    ],
)
def test_flops_are_those_of_every_pass(kind, sections, expected):
    plan = estimate(recipe(kind, **sections), 8, H100)
    assert plan.flops_per_token == pytest.approx(expected, rel=1e-12)
    told = plan.as_json()
    assert told["mfu"] == pytest.approx(expected * told["tokens_per_second"] / 8 / 989e12)
    assert told["tokens_per_step"] == (64 if kind in ("ppo", "grpo") else 32) * 192
    assert told["tokens"] == 3 * told["tokens_per_step"]


@pytest.mark.parametrize("kind", ("ppo", "grpo"))
def test_the_trainer_counts_the_same_flops(kind):
    rollout = {"prompts_per_step": 4, "answers": 2}
    config = tiny.config_of(Layout(), objective={"kind": kind}, rollout=rollout, train={"micro_batch_size": 4})
    task = tiny.build_task(config, Layout(), 0)
    _, work = task.step(0, 4, 1e-3, lambda: 0.0)
    assert work.tokens == 8 * (tiny.PROMPT + tiny.LENGTH)
    plan = estimate(config, 1, DEVICES["cpu"])
    assert work.flops / work.tokens == pytest.approx(plan.flops_per_token, rel=1e-12)
    # and with epochs and models left out, it would not be
    assert work.flops / work.tokens > 1.5 * flops_per_token(passes_of(recipe_sft(config)), 32)


def recipe_sft(config: Config) -> Config:
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, kind="sft"))


@pytest.mark.parametrize("kind", ("sft", "dpo", "reward"))
def test_a_task_on_batches_counts_the_same_flops(kind):
    config = dataclasses.replace(tiny.config_of(Layout()), policy=recipe(kind).policy)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, kind=kind))
    mesh = Mesh(rank=0)
    task = task_of(config, mesh, select_kernels({}, mesh.device))
    plan = estimate(config, 1, DEVICES["cpu"])
    assert task._flops_per_token == pytest.approx(plan.flops_per_token, rel=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("zero", range(4))
def test_a_reference_is_weights_alone_and_a_critic_a_second_trainer(zero):
    job = job_of("ppo", parallel={"zero": zero})
    policy = 6 * (MATRICES // 6 + 2 * 512) + 2 * OUTPUT + 512
    critic = policy - OUTPUT + 512
    assert rank_parameters(job, 0) == policy and rank_parameters(critic_job(job), 0) == critic
    beside = bytes_beside(job, 0)
    tables = 8 * 256 * 64
    assert beside["reference"] == pytest.approx(2 * policy / (8 if zero == 3 else 1) + tables)
    weights, gradients = 2 / (8 if zero == 3 else 1), 4 / (8 if zero >= 2 else 1) + (4 / 8 if zero == 1 else 0)
    states = critic * (weights + gradients + 12 / (8 if zero >= 1 else 1))
    ids = 16 * 2 * 192 * job.micro_batches
    assert beside["critic"] == pytest.approx(states + tables + ids)


@pytest.mark.parametrize("head", ("vocabulary", "scalar"))
def test_a_frozen_model_holds_what_is_planned(head):
    config = recipe("grpo", train={"precision": "fp32"})
    mesh = Mesh(rank=0)
    model = ShardedModel(config, mesh, select_kernels({}, mesh.device), head=head, trained=False)
    held = sum(bucket.parameters.nbytes for buckets in model.buckets.values() for bucket in buckets.buckets)
    job = Job.of(config, 1, DEVICES["cpu"])
    planned = frozen_bytes(job if head == "vocabulary" else critic_job(job), 0) - 8 * 256 * 64
    assert planned == pytest.approx(held, rel=1e-4)  # a bucket is padded


def test_the_cache_is_as_large_as_the_generators(monkeypatch):
    config = recipe("grpo", train={"precision": "fp32"}, rollout={"batch_size": 5, "max_new_tokens": 3})
    caches: list[DecoderCache] = []
    monkeypatch.setattr(
        "megalite.generation.row_group.DecoderCache",
        lambda capacity: caches.append(DecoderCache(capacity)) or caches[-1],
    )
    mesh = Mesh(rank=0)
    model = ShardedModel(config, mesh, select_kernels({}, mesh.device), trained=False)
    model.initialise()
    with model.generating() as stages:
        generator = Generator(stages, model.owners, mesh, config.model)
        generator.run([[1] * 189] * 5, Sampling(1.0), Limits(3))
    held = sum(buffer.untyped_storage().nbytes() for buffers in caches[0]._buffers.values() for buffer in buffers)
    planned = rollout_bytes(Job.of(config, 1, DEVICES["cpu"]), 0)["keys and values"]
    assert planned == held == 2 * 6 * 2 * 64 * 4 * 5 * (189 + 3)


def test_rollouts_can_be_the_worst_moment():
    short, long = (
        rank_memory(job_of("grpo", world=1, rollout=rollout, policy={"minibatches": parts}), 0)
        for rollout, parts in (({"batch_size": 1}, 2), ({"prompts_per_step": 1024}, 2))
    )
    assert short.moment != "rollout" and "keys and values" not in short.parts
    assert long.moment == "rollout" and long.parts["keys and values"] == 2 * 6 * 128 * 2 * 4096 * 192
    assert "activations" not in long.parts and long.total > short.total


def test_what_a_rollout_gathers_under_zero_3():
    job = job_of("grpo", parallel={"zero": 3})
    assert rollout_bytes(job, 0)["whole weights"] == 2 * rank_parameters(job, 0)
    assert rollout_bytes(job_of("grpo", parallel={"zero": 2}), 0)["whole weights"] == 0
    split = job_of("grpo", parallel={"tensor": 2})
    assert rollout_bytes(split, 0)["keys and values"] == 2 * 6 * 64 * 2 * split.rollout.answers * 192


def test_a_written_token_reads_all_weights_and_the_cache():
    """One row on a device whose host and products are never late: bytes over the memory's rate."""
    config = recipe("grpo", rollout={"batch_size": 1})
    job = Job.of(config, 1, dataclasses.replace(H100, layer_overhead=0.0, matmul_flops=1e18))
    cache = 2 * 6 * 128 * 2 * (128 + 32)
    drawn = 5000 * 24
    read = 2 * (MATRICES + OUTPUT) + cache + drawn
    assert token_seconds(job, job.rollout) == pytest.approx(read / H100.memory_bandwidth, rel=1e-6)
    slow = Job.of(config, 1, H100)  # the host launches six layers, and the output layer as one
    assert token_seconds(slow, slow.rollout) == pytest.approx(7 * H100.layer_overhead)


def test_the_parts_of_a_step():
    job = job_of("ppo")
    time = step_time(job)
    assert time.seconds == pytest.approx(sum(time.parts.values()))
    update = dataclasses.replace(job, rollout=None, beside=type(job.beside)())
    for name, seconds in step_time(update).parts.items():
        assert time.parts[name] == pytest.approx(3 * 2 * seconds)  # epochs, mini-batches
    critic = step_time(dataclasses.replace(update, reads="values"))
    assert time.parts["critic's updates"] == pytest.approx(6 * critic.seconds)
    assert job.rollout.answers == 8 and job.rollout.batches == 1
    written = 64 * token_seconds(job, job.rollout)
    assert time.parts["rollout: writing answers"] == pytest.approx(written)
    # four micro-batches of two answers are scored, two of them are a mini-batch
    assert job.micro_batches == 2
    assert time.parts["scores: policy"] == pytest.approx(4 * stage_works(job)[0].forward.seconds)


def test_a_reference_scores_every_pair_first():
    job = job_of("dpo")
    time = step_time(job)
    assert time.parts["reference"] == pytest.approx(2 * stage_works(job)[0].forward.seconds)
    assert time.parts["reference"] == pytest.approx(forward_seconds(job))
    assert step_time(job_of("sft")).parts.keys() == time.parts.keys() - {"reference"}


@pytest.mark.parametrize("kind", ("dpo", "grpo", "ppo"))
@pytest.mark.parametrize(
    "parallel",
    (
        {"tensor": 2, "pipeline": 2},
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 3, "zero": 2},
        {"pipeline": 2, "schedule": "zb_v", "virtual_stages": 2},
        {"zero": 3},
    ),
)
def test_the_searchs_bound_is_below_the_time(kind, parallel):
    job = job_of(kind, parallel=parallel)
    assert 0.5 * step_time(job).seconds < least_step_seconds(job) <= step_time(job).seconds * (1 + 1e-9)


def test_a_reward_model_has_the_size_of_its_checkpoint(tmp_path):
    small = recipe("reward", model={"layers": 2, "max_positions": 512})
    mesh = Mesh(rank=0)
    task = task_of(small, mesh, select_kernels({}, mesh.device))
    task.trainer.initialise()
    with CheckpointManager(tmp_path, small, mesh) as manager:
        manager.save(task.saved, {"step": 1})
        manager.wait()
    there, missing = (
        bytes_beside(job_of("ppo", rollout={"reward_model": str(path)}), 0)["reward model"]
        for path in (tmp_path, tmp_path / "later")
    )
    assert missing == 2 * (MATRICES + 13 * 512 + OUTPUT + 512) + 8 * 256 * 64
    assert there == 2 * (MATRICES // 3 + 5 * 512 + OUTPUT + 512) + 8 * 512 * 64


@pytest.mark.parametrize("search", (False, True))
def test_the_program_tells_the_parts(search, capsys, monkeypatch, tmp_path):
    fields = [f"--{name} {value}" for name, value in FIELDS.items()]
    path = tmp_path / "grpo.toml"
    path.write_text('[objective]\nkind = "grpo"\n[rollout]\nreward = "m:f"\nmax_new_tokens = 64\nanswers = 4\n')
    words = ["plan.py", "--recipe", str(path), "--devices", "2", "--device-type", "h100", *" ".join(fields).split()]
    for json_too in (False, True):
        monkeypatch.setattr(sys, "argv", words + ["--search"] * search + ["--json"] * json_too)
        main()
        said = capsys.readouterr().out
        if json_too:
            told = json.loads(said)["best"][0] if search else json.loads(said)
            assert told["step_parts_seconds"]["rollout: writing answers"] > 0
            assert told["step_seconds"] == pytest.approx(sum(told["step_parts_seconds"].values()))
            assert told["memory_bytes"]["reference"] > 0
        else:
            assert "rollout: writing answers" in said and "updates" in said and "Chinchilla" not in said
            assert search or "answers of up to 64 tokens a step" in said


FIELDS = {f"model.{name}": value for name, value in MODEL.items()} | {"train.seq_length": 192, "policy.minibatches": 2}
