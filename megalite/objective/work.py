"""What a step computes: which models see its tokens how often, and the model FLOPs of that.

The trainer's MFU and the planner both read this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.config import AdapterConfig, Config, ModelConfig
from megalite.model.cost import NO_ADAPTER, training_flops_per_token
from megalite.objective import build_objective, head_for


@dataclass(frozen=True)
class Work:
    """What a step computed over all ranks: `tokens` trained on (padding of packed rows included), and the model FLOPs
    of everything that was done for them."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class Passes:
    """How often one model sees every token of a step: `forward` times alone, `training` times forward and backward.

    `head` is that of `megalite.model.sharded.ShardedModel`. With an `adapter`, only that is trained.
    """

    model: ModelConfig
    head: str = "vocabulary"
    forward: int = 0
    training: int = 0
    adapter: AdapterConfig = NO_ADAPTER


def has_reference(config: Config) -> bool:
    """Whether a frozen reference stands beside the trained model."""
    prompts = config.objective.data_format == "prompt"
    return config.objective.kind == "dpo" or (prompts and config.policy.kl > 0)


def has_critic(config: Config) -> bool:
    """Whether a critic is trained beside the policy."""
    return config.objective.kind == "ppo"


def head_of(config: Config) -> str:
    """The head of the model that is trained."""
    return head_for(build_objective(config).reads)


def passes_of(config: Config, reward_model: ModelConfig | None = None) -> tuple[Passes, ...]:
    """The passes of a step of `objective.kind`; `reward_model` is the model that scores the answers, if any.

    A policy writes the answers and scores them once (a forward pass each) and learns from them `policy.epochs` times;
    a reference, a critic and a reward model score them once, and the critic learns as often as the policy.
    """
    model, reference, adapter = config.model, int(has_reference(config)), config.adapter
    if config.objective.data_format != "prompt":
        return (Passes(model, head_of(config), forward=reference, training=1, adapter=adapter),)
    epochs = config.policy.epochs
    passes = [Passes(model, forward=2 + reference, training=epochs, adapter=adapter)]
    if has_critic(config):
        passes.append(Passes(model, "scalar", forward=1, training=epochs, adapter=adapter))
    if reward_model is not None:
        passes.append(Passes(reward_model, "scalar", forward=1))
    return tuple(passes)


def flops_per_token(passes: Sequence[Passes], length: int, causal: str = "full") -> float:
    """Model FLOPs of a token in rows of `length`; a forward pass alone is a third of training all weights."""
    total = 0.0
    for each in passes:
        whole = training_flops_per_token(each.model, length, head=each.head, causal=causal)
        trained = training_flops_per_token(each.model, length, head=each.head, causal=causal, adapter=each.adapter)
        total += each.training * trained + each.forward * whole / 3
    return total
