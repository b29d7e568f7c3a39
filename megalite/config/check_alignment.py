"""Combinations of the sections `objective`, `rollout` and `policy` that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from megalite.config.schema import Config
from megalite.errors import UserError

Refuse = Callable[[Config, str, str, str], NoReturn]
"""(configuration, field, what is wrong with its value, what to do)."""


def check_alignment(config: Config, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit the others."""
    objective = config.objective
    if config.train.z_loss and objective.kind in ("reward", "dpo", "ppo", "grpo"):
        refuse(config, "train.z_loss", f"has no effect with objective.kind = {objective.kind}", "use 0")
    if objective.label_smoothing and objective.loss == "ipo":
        refuse(config, "objective.label_smoothing", "has no effect with objective.loss = ipo", "use 0, or sigmoid")
    if objective.data_format == "prompt":
        _check_rollout(config, refuse)
        _check_policy(config, refuse)


def _check_rollout(config: Config, refuse: Refuse) -> None:
    rollout, kind = config.rollout, config.objective.kind
    if not rollout.reward and not rollout.reward_model:
        raise UserError(
            f"rollout.reward and rollout.reward_model are empty, and objective.kind = {kind} needs a reward; name a "
            "module:function or a checkpoint"
        )
    everything = "cuts tokens off, and the probabilities of the losses are those of all tokens"
    if rollout.top_k:
        refuse(config, "rollout.top_k", everything, "use 0, and rollout.temperature")
    if rollout.top_p < 1:
        refuse(config, "rollout.top_p", everything, "use 1, and rollout.temperature")
    if kind == "grpo" and rollout.answers < 2:
        refuse(config, "rollout.answers", "leaves grpo nothing to compare an answer with", "use 2 or more")
    if rollout.max_new_tokens >= config.train.seq_length:
        remedy = "shorten it, or raise train.seq_length"
        problem = f"leaves no room for a prompt in train.seq_length = {config.train.seq_length}"
        refuse(config, "rollout.max_new_tokens", problem, remedy)


def _check_policy(config: Config, refuse: Refuse) -> None:
    policy, answers = config.policy, config.answers_per_step
    product = "rollout.prompts_per_step * rollout.answers"
    if answers % policy.minibatches:
        remedy = f"use a divisor of {answers}"
        refuse(config, "policy.minibatches", f"does not divide {product} = {answers}", remedy)
    if config.train.global_batch_size != answers // policy.minibatches:
        problem = f"is not {product} / policy.minibatches = {answers // policy.minibatches}"
        refuse(config, "train.global_batch_size", problem, "leave it out")
    if policy.kl and policy.kl_in == "loss" and policy.kl_estimator == "k1":
        problem = "has a gradient of zero, on average, with policy.kl_in = loss"
        refuse(config, "policy.kl_estimator", problem, "use k2 or k3, or policy.kl_in = reward")
    if policy.kl_target and not policy.kl:
        refuse(config, "policy.kl_target", "adapts policy.kl, which is 0", "give policy.kl a weight to begin with")
    if config.recovery.spike_threshold:
        problem = f"watches the loss, which says little about progress with objective.kind = {config.objective.kind}"
        refuse(config, "recovery.spike_threshold", problem, "use 0")
    if config.train.batch_ramp:
        refuse(config, "train.batch_ramp", "has no effect where rollout.prompts_per_step counts", "leave it out")
