"""Recipes of alignment that cannot work are refused by field, value and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from megalite.config import build_config
from megalite.config.check import check_layout
from megalite.errors import UserError

pytestmark = pytest.mark.fast

REWARD = {"rollout": {"reward": "rewards:right"}}

REFUSED: tuple[tuple[str, dict[str, dict[str, Any]], str], ...] = (
    ("ppo", {}, "rollout.reward and rollout.reward_model are empty, and objective.kind = ppo needs a reward"),
    ("ppo", {"rollout": {"reward": "r:f", "top_k": 5}}, "rollout.top_k = 5 cuts tokens off"),
    ("grpo", {"rollout": {"reward": "r:f", "answers": 4, "top_p": 0.9}}, "rollout.top_p = 0.9 cuts tokens off"),
    ("grpo", {"rollout": {"reward": "r:f", "answers": 1}}, "rollout.answers = 1 leaves grpo nothing to compare"),
    ("ppo", {"rollout": {"reward": "r:f", "max_new_tokens": 64}}, "rollout.max_new_tokens = 64 leaves no room"),
    ("ppo", REWARD | {"policy": {"minibatches": 3}}, "policy.minibatches = 3 does not divide"),
    (
        "ppo",
        REWARD | {"train": {"global_batch_size": 8}},
        "train.global_batch_size = 8 is not rollout.prompts_per_step",
    ),
    (
        "ppo",
        REWARD | {"policy": {"kl_in": "loss", "kl_estimator": "k1"}},
        "policy.kl_estimator = k1 has a gradient of",
    ),
    ("ppo", REWARD | {"policy": {"kl": 0.0, "kl_target": 6.0}}, "policy.kl_target = 6.0 adapts policy.kl, which is 0"),
    ("ppo", REWARD | {"recovery": {"spike_threshold": 5.0}}, "recovery.spike_threshold = 5.0 watches the loss"),
    ("ppo", REWARD | {"train": {"batch_ramp": [8, 8, 64]}}, "train.batch_ramp"),
    ("dpo", {"train": {"z_loss": 1e-4}}, "train.z_loss = 0.0001 has no effect with objective.kind = dpo"),
    ("dpo", {"objective": {"loss": "ipo", "label_smoothing": 0.1}}, "objective.label_smoothing = 0.1 has no effect"),
)


@pytest.mark.parametrize(("kind", "sections", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_with_the_remedy(kind: str, sections: dict[str, dict[str, Any]], message: str) -> None:
    tables: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 64},
        "objective": {"kind": kind},
        "train": {"seq_length": 64, "micro_batch_size": 1},
        "rollout": {"max_new_tokens": 16, "prompts_per_step": 16},
        "data": {"tokenizer": "byte"},
    }
    for name, values in sections.items():
        tables[name] = tables.get(name, {}) | values
    with pytest.raises(UserError) as caught:
        check_layout(build_config(tables), 1)
    assert str(caught.value).startswith(message) and ";" in str(caught.value)


def test_the_batch_follows_from_the_rollout() -> None:
    config = build_config(
        {
            "objective": {"kind": "grpo"},
            "rollout": {"prompts_per_step": 12, "answers": 4, "reward": "r:f"},
            "policy": {"minibatches": 3},
        }
    )
    assert config.train.global_batch_size == 16
    assert config.samples_at(0) == 12 and config.samples_after(5) == 60
    assert (config.policy.kl_in, config.policy.kl_estimator) == ("loss", "k3")
    assert config.policy.critic_lr == config.optimizer.lr
    assert build_config({}).train.global_batch_size == 8
