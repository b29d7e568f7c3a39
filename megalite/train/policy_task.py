"""PPO and GRPO: a step is one set of prompts, the policy's answers, and all updates from them.

    prompts -> answers by the live weights -> rewards -> log-probabilities of policy and reference, values of the critic
    -> advantages -> `policy.epochs` passes over the answers, each `policy.minibatches` optimizer steps

Nothing is kept from one step to the next but weights, optimizer state and the weight of the divergence, so a run that
is killed in a step repeats it to the bit. `old` log-probabilities are the trainer's own, of the micro-batches of the
first pass: in its first mini-batch the ratio is exactly 1.

Sources: Ouyang et al. 2022 (PPO), Shao et al. 2024 (GRPO). R answers, S tokens of a row.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.align.advantages import adapted_kl, generalised_advantages, group_advantages, token_rewards, whiten
from megalite.align.frozen import Reference, load_frozen
from megalite.align.rewards import call_reward, reward_function
from megalite.align.rollout import Answer, Dealer, Rollouts, answer_of, columns_of, epoch_order, share_answers
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.peers import Peers
from megalite.checkpoint.state import Checkpointable
from megalite.config import Config
from megalite.cuda_graph import recorder_for
from megalite.data.batch import Batch
from megalite.errors import CommonError, UserError
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.model.decoder import CRITIC
from megalite.model.sharded import ShardedModel
from megalite.objective.policy import ClippedPolicy, ClippedValue, kl_estimate
from megalite.objective.work import Work, flops_per_token, has_critic, has_reference, passes_of
from megalite.observe.timeline import Recorder
from megalite.text.tokenizers import Tokenizer, load_tokenizer
from megalite.train.example_inputs import find_template
from megalite.train.task import Flag, Phase
from megalite.train.together import Together
from megalite.train.trainer import StepResult, Trainer

METRICS = (
    "reward_mean",
    "reward_std",
    "kl",
    "entropy",
    "response_tokens",
    "finished",
    "sampler_difference",
)
"""Numbers about a step's answers, known on the last stage."""


class PolicyTask:
    """One step of PPO (with a critic) or of GRPO (without). See `megalite.train.task.Task`."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels) -> None:
        self.config, self.mesh, self.kernels = config, mesh, kernels
        asked = config.rollout.cuda_graph
        self._recorder = recorder_for(mesh.device, "rollout.cuda_graph = true") if asked else None
        self.trainer = Trainer(config, mesh, kernels)
        self.critic: Trainer | None = None
        if has_critic(config):
            self.critic = Trainer(
                config, mesh, kernels, prefix=CRITIC, objective=ClippedValue(config.policy.value_clip)
            )
        self._together = Together([self.trainer] if self.critic is None else [self.trainer, self.critic])
        self._peers = Peers(mesh)
        self._reference: Reference | None = None
        if has_reference(config):
            self._reference = Reference(config, mesh, kernels, self._peers, self.trainer)
        self._reward = reward_function(config.rollout.reward) if config.rollout.reward else None
        self._reward_model: ShardedModel | None = None
        self._reward_identity: dict[str, str] = {}
        self._tokenizer: Tokenizer | None = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        self._stop_ids: frozenset[int] = frozenset()
        self._stop_strings: tuple[str, ...] = ()
        self._group, self._pp = mesh.group("dp", "ep"), mesh.group("pp")
        self._dealer = Dealer.of(config, mesh)
        self._kl = config.policy.kl
        self.phase: Phase = lambda name: nullcontext()

    # What the loop needs around the steps

    @property
    def saved(self) -> Checkpointable:
        return self._together

    def open(self, train: Any, valid: Any, eod: int | None) -> None:
        self._prompts, self._validation = train, valid
        if self.config.rollout.ignore_eos:
            return
        template = find_template(self.config)
        self._stop_ids = frozenset(() if eod is None else (eod,))
        if template is not None:
            self._stop_ids, self._stop_strings = self._stop_ids | set(template.stop_ids), tuple(template.stop_strings)

    def observe(self, recorder: Recorder) -> None:
        self.phase = recorder.phase
        for trainer in self._together.trainers:
            trainer.observe = recorder.observe

    def begin(self, checkpoints: CheckpointManager) -> dict[str, Any]:
        config = self.config
        source = config.checkpoint.load
        self.trainer.initialise_before(source)
        if source:
            checkpoints.load(self.trainer, source, optimizer=False)
        if self.critic is not None:
            start = config.policy.critic or source
            self.critic.initialise_before(start)
            if start:
                checkpoints.load(self.critic, start, optimizer=False)
        return {}

    def prepare(self, state: Mapping[str, Any]) -> None:
        if self._reference is not None:
            self._reference.prepare(state)
        path = self.config.rollout.reward_model
        if path and self._reward_model is None:
            self._reward_model, self._reward_identity = load_frozen(
                self.config,
                self.mesh,
                self.kernels,
                self._peers,
                path,
                field="rollout.reward_model",
                head="scalar",
                known=state.get("reward_model") or None,
            )
        self._kl = state.get("kl", self.config.policy.kl)
        if self.critic is not None:
            self.critic.optimizer.set_step_count(state.get("critic_updates", 0))

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"kl": self._kl, "reward_model": self._reward_identity}
        if self._reference is not None:
            state |= self._reference.state()
        if self.critic is not None:
            state["critic_updates"] = self.critic.optimizer.step_count
        return state

    def close(self) -> None:
        pass

    # A step

    def step(self, first: int, samples: int, lr: float, flag: Flag) -> tuple[StepResult, Work]:
        prompts = [self._prompts.prompt(number) for number in range(first, first + samples)]
        each, began = self.config.rollout.answers, time.perf_counter()
        with self.phase("rollout"):
            answers = self._answer(prompts, each, first * each, self.config.run.seed)
            seconds = time.perf_counter() - began
        with self.phase("reward"):
            scores_R = self._call_reward(prompts, each, answers)
        with self.phase("score"):
            rollouts = share_answers(answers, self._group, self.config, self.mesh.device)
            order = epoch_order(len(rollouts.ends_R), self.config.run.seed, first, 0)
            columns, metrics = self._judge(rollouts, scores_R, order)
        result, further = self._update(rollouts, columns, first, lr, flag)
        named = metrics | further | {"kl_weight": self._kl, "rollout_seconds": seconds}
        if self.config.policy.kl_target and self._reference is not None:
            policy = self.config.policy
            self._kl = adapted_kl(self._kl, named["kl"], policy.kl_target, len(rollouts.ends_R), policy.kl_horizon)
        return dataclasses.replace(result, metrics=named), self._work(rollouts)

    def _answer(self, prompts: Sequence[Any], each: int, first_row: int, seed: int) -> list[Answer]:
        """This rank's part of the answers to these prompts, so many each; the same on all ranks of a copy of the model.
        What is drawn depends on the seed and on an answer's number over the whole run alone."""
        config, mesh, rollout = self.config, self.mesh, self.config.rollout
        part = len(prompts) * each // mesh.samples_size
        rows = range(mesh.samples_index * part, (mesh.samples_index + 1) * part)
        sampling = Sampling(rollout.temperature, seed=seed)
        limits = Limits(rollout.max_new_tokens, self._stop_ids, self._stop_strings)
        asked = [prompts[row // each].ids for row in rows]
        with self.trainer.generating() as stages:
            exact = config.train.batch_invariant
            generator = Generator(
                stages, self.trainer.owners, mesh, config.model, trainer_logprobs=exact, graph=self._recorder
            )
            completions = generator.run_all(
                asked,
                sampling,
                limits,
                self._tokenizer if self._stop_strings else None,
                batch=rollout.batch_size or part,
                rows=[first_row + row for row in rows],
                sampler_logprobs=True,
            )
        return [answer_of(completion, completion.text or self._text(completion.new_ids)) for completion in completions]

    def _text(self, ids: Sequence[int]) -> str:
        """An answer's text, without the token that ended it; empty without a tokenizer."""
        if self._tokenizer is None or self._stop_strings:
            return ""
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self._stop_ids else ids)

    def _call_reward(self, prompts: Sequence[Any], each: int, own: Sequence[Answer]) -> Tensor:
        """The scores of all answers by `rollout.reward`, float64 [R]; zeros without one. The function is called on one
        rank of each copy of the model; an error of any is raised on all."""
        scores_R = torch.zeros(len(prompts) * each, dtype=torch.float64)
        if self._reward is None:
            return scores_R
        start = self.mesh.samples_index * len(own)
        said: dict[str, Any] = {}
        if self.mesh.rank == self.mesh.rank_at(pp=0, cp=0, tp=0):
            columns = columns_of(prompts, each)
            try:
                said["scores"] = call_reward(
                    self.config.rollout.reward,
                    self._reward,
                    [prompts[row // each].text for row in range(start, start + len(own))],
                    [answer.text for answer in own],
                    [answer.ids for answer in own],
                    {name: values[start : start + len(own)] for name, values in columns.items()},
                )
            except UserError as error:
                said["fault"] = str(error)
        everyone = self._peers.exchange(said | {"start": start})
        if fault := next((said["fault"] for said in everyone if "fault" in said), None):
            raise CommonError(fault)
        for said in everyone:
            if "scores" in said:
                place = slice(said["start"], said["start"] + len(said["scores"]))
                scores_R[place] = torch.tensor(said["scores"], dtype=torch.float64)
        return scores_R

    def _ask_reward_model(self, rollouts: Rollouts, batches: Sequence[Batch], order: np.ndarray) -> Tensor | float:
        """Its scores of all answers, float64 [R], on the last stage; 0 on the others, and without one."""
        if self._reward_model is None:
            return 0.0
        parts = self._reward_model.values(batches, shape=self._shape(rollouts))
        if not parts:
            return 0.0
        values_RS = self._dealer.collect(parts, order, self._group)
        return values_RS.gather(1, rollouts.ends_R.unsqueeze(1)).squeeze(1)

    def _shape(self, rollouts: Rollouts) -> tuple[int, int]:
        """(B, S) of a micro-batch of answers."""
        return self.config.train.micro_batch_size, rollouts.tokens_RS.shape[1]

    def _judge(
        self, rollouts: Rollouts, scores_R: Tensor, order: np.ndarray
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(the columns of the objectives, [R, S] each, on the last stage; `METRICS`, on every rank)."""
        batches, shape = self._dealer.batches(rollouts, order, {}), self._shape(rollouts)
        temperature = self.config.rollout.temperature
        parts = {"old": _logprobs(self.trainer.score(batches, shape=shape, temperature=temperature))}
        if self._reference is not None:
            scores = self._reference.model.score(batches, shape=shape, temperature=temperature)
            parts["reference"] = _logprobs(scores)
        if self.critic is not None:
            parts["values"] = self.critic.values(batches, shape=shape)
        scores_R = scores_R + self._ask_reward_model(rollouts, batches, order)
        if self.trainer.last_stage is None:
            return {}, self._tell(METRICS, [])
        columns = {name: self._dealer.collect(part, order, self._group) for name, part in parts.items()}
        metrics = self._tell(METRICS, self._describe(rollouts, scores_R, columns))
        return columns | self._advantages(rollouts, scores_R, columns), metrics

    def _tell(self, names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
        """Numbers that the ranks of the last stage know, by name, on every rank."""
        told = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)
        if numbers:
            told.copy_(torch.tensor(numbers, dtype=torch.float64))
        self._pp.broadcast(told, self.trainer.owners[-1]).wait()
        return dict(zip(names, told.tolist()))

    def _describe(self, rollouts: Rollouts, scores_R: Tensor, columns: Mapping[str, Tensor]) -> list[float]:
        """`METRICS` of the answers, before any update."""
        mask_RS, old_RS = rollouts.mask_RS, columns["old"]
        actions = mask_RS.sum()
        divergence_RS = kl_estimate(old_RS, columns.get("reference", old_RS), "k1") * mask_RS
        difference_RS = (rollouts.sampled_RS - old_RS).abs() * mask_RS
        numbers = (
            scores_R.mean(),
            scores_R.std() if len(scores_R) > 1 else torch.zeros(()),
            divergence_RS.sum(1).mean(),
            -(old_RS * mask_RS).sum() / actions,
            rollouts.lengths_R.double().mean(),
            rollouts.finished_R.double().mean(),
            difference_RS.sum() / actions,
        )
        return [float(number) for number in numbers]

    def _advantages(self, rollouts: Rollouts, scores_R: Tensor, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The column `advantages`, and `returns` for a critic."""
        policy, mask_RS = self.config.policy, rollouts.mask_RS
        old_RS = columns["old"]
        reference_RS = columns.get("reference", old_RS)
        weight = self._kl if policy.kl_in == "reward" else 0.0
        if self.critic is not None:
            rewards_RS = token_rewards(old_RS, reference_RS, scores_R, mask_RS, weight, policy.kl_estimator)
            advantages_RS, returns_RS = generalised_advantages(
                columns["values"], rewards_RS, mask_RS, policy.gamma, policy.lam
            )
            if policy.normalise == "std":
                advantages_RS = whiten(advantages_RS, mask_RS)
            return {"advantages": advantages_RS, "returns": returns_RS}
        divergence_R = (kl_estimate(old_RS, reference_RS, policy.kl_estimator) * mask_RS).sum(1)
        grouped_PA = (scores_R - weight * divergence_R).view(-1, self.config.rollout.answers)
        advantages_R = group_advantages(grouped_PA, policy.normalise).flatten()
        return {"advantages": advantages_R.unsqueeze(1) * mask_RS}

    def _update(
        self, rollouts: Rollouts, columns: Mapping[str, Tensor], first: int, lr: float, flag: Flag
    ) -> tuple[StepResult, dict[str, float]]:
        """All passes over the answers; the means over their updates, and metrics by name."""
        config, total, shape = self.config, len(rollouts.ends_R), self._shape(rollouts)
        objective = ClippedPolicy.from_config(config)
        if objective.kl:
            objective = dataclasses.replace(objective, kl=self._kl)
        policies: list[StepResult] = []
        critics: list[StepResult] = []
        for epoch in range(config.policy.epochs):
            order = epoch_order(total, config.run.seed, first, epoch)
            for part in order.reshape(config.policy.minibatches, -1):
                batches = self._dealer.batches(rollouts, part, columns)
                policies.append(self.trainer.step(batches, lr, flag(), objective, shape))
                if self.critic is not None:
                    rate = lr * (config.policy.critic_lr / config.optimizer.lr)
                    critics.append(self.critic.step(batches, rate, shape=shape))
        metrics = {
            "ratio_deviation": policies[0].metrics["ratio_deviation"],
            "clip_fraction": _mean([result.metrics["clip_fraction"] for result in policies]),
            "approx_kl": _mean([result.metrics["approx_kl"] for result in policies]),
        }
        if critics:
            metrics["value_loss"] = _mean([result.loss for result in critics])
        result = StepResult(
            loss=_mean([result.loss for result in policies]),
            grad_norm=_mean([result.grad_norm for result in policies]),
            accepted=all(result.accepted for result in policies + critics),
            flags=policies[-1].flags,
            units=sum(result.units for result in policies),
        )
        return result, metrics

    def _work(self, rollouts: Rollouts) -> Work:
        """The answers' tokens with their prompts, and all passes over them: sampling, scores, updates."""
        tokens = int((rollouts.ends_R + 1).sum())
        passes = passes_of(self.config, self._reward_model.config.model if self._reward_model is not None else None)
        return Work(tokens, tokens * flops_per_token(passes, rollouts.tokens_RS.shape[1]))

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """The mean reward of one answer to each of the first `train.eval_samples` validation prompts, sampled as in
        training; there is no loss."""
        unit = self.mesh.samples_size * self.config.train.micro_batch_size
        count = -(-self.config.train.eval_samples // unit) * unit
        prompts = [self._validation.prompt(number) for number in range(count)]
        answers = self._answer(prompts, 1, 0, self.config.run.seed + 1)
        scores_R = self._call_reward(prompts, 1, answers)
        rollouts, order = share_answers(answers, self._group, self.config, self.mesh.device), np.arange(count)
        scores_R = scores_R + self._ask_reward_model(rollouts, self._dealer.batches(rollouts, order, {}), order)
        told = self._tell(("validation_reward",), [float(scores_R.mean())])
        return math.nan, told


def _logprobs(scores: Sequence[Tensor]) -> list[Tensor]:
    return [score_2BS[0] for score_2BS in scores]


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)
