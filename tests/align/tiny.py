"""A tiny task with a known optimum: a random model learns to write even token ids.

The reward is the share of even ids among the `LENGTH` tokens of an answer. With the divergence k1 in the reward, weight
b, the best policy makes every token even with probability p, p / (1 - p) = exp(1 / (LENGTH b)), at a divergence of
LENGTH (ln 2 - H(p)) nats an answer. With k3 in the loss, whose gradient is that of KL(reference || policy), p solves
(2 p - 1) / (p (1 - p)) = 1 / (LENGTH b / 2) instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megalite.config import Config, build_config
from megalite.config.check import check_layout
from megalite.kernels import select_kernels
from megalite.mesh import Mesh, create_group
from megalite.optim.lr_schedule import learning_rate
from megalite.train.policy_task import PolicyTask
from megalite.train.trainer import StepResult
from tests.support.parity import Layout

VOCABULARY, PROMPT, LENGTH = 64, 8, 16

FIELDS: dict[str, dict[str, Any]] = {
    "run": {"seed": 0},
    "model": {
        "layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "heads": 4,
        "kv_heads": 2,
        "vocab_size": VOCABULARY,
        "max_positions": 64,
    },
    "train": {"steps": 1000, "seq_length": 32, "micro_batch_size": 8, "precision": "fp32"},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-3, "schedule": "constant", "weight_decay": 0.0},
    "objective": {"kind": "ppo"},
    "rollout": {
        "prompts_per_step": 64,
        "answers": 1,
        "max_new_tokens": LENGTH,
        "ignore_eos": True,
        "reward": "tests.align.tiny:even",
    },
    "policy": {"epochs": 4, "minibatches": 2, "kl": 0.05},
}


def even(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def optimum(kl: float) -> tuple[float, float]:
    """(reward, divergence) of the best policy, divergence in the reward."""
    p = 1 / (1 + math.exp(-1 / (LENGTH * kl)))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    return p, LENGTH * (math.log(2) - entropy)


@dataclass
class Prompt:
    ids: list[int]
    text: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


class RandomPrompts:
    """Prompt n is a function of n alone."""

    def __init__(self, shortest: int = PROMPT) -> None:
        self.shortest = shortest

    def prompt(self, number: int) -> Prompt:
        generator = np.random.default_rng([5, number])
        length = int(generator.integers(self.shortest, PROMPT + 1))
        return Prompt(generator.integers(0, VOCABULARY, length).tolist(), columns={"number": number})


def config_of(layout: Layout, **sections: dict[str, Any]) -> Config:
    tables = {name: dict(values) for name, values in FIELDS.items()}
    for path, value in layout.fields.items():
        section, name = path.split(".")
        tables.setdefault(section, {})[name] = value
    for name, values in sections.items():
        tables.setdefault(name, {}).update(values)
    config = build_config(tables)
    check_layout(config, layout.world)
    return config


def build_task(
    config: Config, layout: Layout, rank: int, make_group: Any = create_group, shortest: int = PROMPT
) -> PolicyTask:
    sizes = {"pp": layout.pipeline, "dp": layout.data, "cp": layout.context, "tp": layout.tensor}
    mesh = Mesh(**sizes, rank=rank, make_group=make_group)
    task = PolicyTask(config, mesh, select_kernels({}, mesh.device))
    task.open(RandomPrompts(shortest), RandomPrompts(shortest), None)
    task.begin(None)  # type: ignore[arg-type]
    task.prepare({})
    return task


def train(task: PolicyTask, steps: int, first: int = 0) -> list[StepResult]:
    """The results of so many steps, from step number `first` on."""
    prompts, results = task.config.rollout.prompts_per_step, []
    for step in range(first, first + steps):
        lr = learning_rate(step + 1, task.config)
        result, _ = task.step(step * prompts, prompts, lr, lambda: 0.0)
        assert result.accepted
        results.append(result)
    return results


def average(results: Sequence[StepResult], name: str) -> float:
    return math.fsum(result.metrics[name] for result in results) / len(results)


def replaced(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values in some sections."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )
