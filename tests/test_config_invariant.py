"""What `train.invariant` does not cover is refused by field, value and remedy."""

import pytest

from megalite.config import load_config
from megalite.config.check import check_layout
from megalite.errors import UserError

pytestmark = pytest.mark.fast

BASE = (
    "--model.vocab_size 101 --train.global_batch_size 16 --train.seq_length 96 --model.kv_heads 4 --train.invariant 4"
)


def check(world_size: int, overrides: str) -> None:
    check_layout(load_config(None, f"{BASE} {overrides}".split()), world_size)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ""),
        (4, ""),
        (16, "--parallel.tensor 4 --parallel.sequence false"),
        (6, "--parallel.pipeline 3 --parallel.zero 0"),
        (2, "--objective.kind sft --model.qk_norm true --model.block sandwich_norm"),
    ],
)
def test_covered(world_size: int, overrides: str) -> None:
    check(world_size, overrides)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (1, "--train.invariant 6", "train.invariant = 6 is not a power of two; use 4 or 8"),
        (
            2,
            "--parallel.tensor 2",
            "parallel.sequence = true is not covered by train.invariant = 4; use false, or train.invariant = 0",
        ),
        (2, "--parallel.context 2", "parallel.context = 2 is not covered by train.invariant = 4; use 1, or"),
        (2, "--parallel.zero 2", "parallel.zero = 2 is not covered by train.invariant = 4; use 0 or 1, or"),
        (1, "--model.experts 4", "model.experts = 4 is not covered by"),
        (1, "--train.fp8 row", "train.fp8 = row is not covered by"),
        (1, "--optimizer.kind muon", "optimizer.kind = muon is not covered by train.invariant = 4; use adamw, or"),
        (1, "--objective.kind dpo", "objective.kind = dpo is not covered by train.invariant = 4; use next_token or"),
        (1, "--adapter.kind lora", "adapter.kind = lora is not covered by"),
        (1, "--model.block mine:Block", "model.block = mine:Block is not covered by"),
        (
            1,
            "--model.qk_norm true --model.qk_norm_scope all_heads",
            "model.qk_norm_scope = all_heads is not covered by",
        ),
        (1, "--model.kv_heads 2", "model.kv_heads = 2 is not divisible by train.invariant = 4; use a multiple of 4"),
        (1, "--model.ffn_hidden_size 1026", "model.ffn_hidden_size = 1026 is not divisible by train.invariant = 4"),
        (
            8,
            "--parallel.tensor 8 --parallel.sequence false",
            "parallel.tensor = 8 does not divide train.invariant = 4; use a power of two up to it",
        ),
        (3, "", "train.invariant = 4 is not divisible by the 3 copies of the model on 3 ranks"),
        (
            1,
            "--train.global_batch_size 18",
            "train.global_batch_size = 18 is not divisible by train.micro_batch_size = 1 * 4 parts of train.invariant; "
            "use 16 or 20",
        ),
    ],
)
def test_refused(world_size: int, overrides: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check(world_size, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


POLICY = (
    "--model.vocab_size 101 --train.seq_length 96 --objective.kind grpo --rollout.reward mine:reward "
    "--rollout.max_new_tokens 32 --rollout.answers 2 --run.device cpu --train.batch_invariant true"
)


def check_policy(overrides: str) -> None:
    check_layout(load_config(None, f"{POLICY} {overrides}".split()), 1)


@pytest.mark.parametrize("overrides", ["", "--objective.kind ppo --parallel.zero 3 --model.qk_norm true"])
def test_batches_covered(overrides: str) -> None:
    check_policy(overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--objective.kind next_token", "objective.kind = next_token is not covered by train.batch_invariant = true;"),
        ("--run.device auto", "run.device = auto is not covered by train.batch_invariant = true; use cpu, or"),
        (
            "--rollout.temperature 0.7",
            "rollout.temperature = 0.7 is not covered by train.batch_invariant = true; use 1",
        ),
        ("--model.feed_forward geglu", "model.feed_forward = geglu is not covered by"),
        ("--kernels.default reference", "kernels.attention = reference is not covered by"),
        ("--kernels.swiglu reference", "use auto or native, or train.batch_invariant = false"),
        ("--adapter.kind lora", "adapter.kind = lora is not covered by"),
    ],
)
def test_batches_refused(overrides: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_policy(overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
