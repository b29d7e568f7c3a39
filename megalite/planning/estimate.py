"""One plan: everything that `tools/plan.py` reports about a configuration on a number of devices of one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalite.config import Config
from megalite.config.check import check_layout
from megalite.errors import UserError
from megalite.model.cost import FORMULA, FORMULA_ADAPTER, FORMULA_HALF
from megalite.objective.work import flops_per_token
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import Device
from megalite.planning.job import Job
from megalite.planning.memory import RankMemory, worst_rank
from megalite.planning.states import rank_parameters
from megalite.planning.step_time import StepTime, step_time

CHINCHILLA_TOKENS = 20.0
"""Tokens a parameter at which Hoffmann et al. 2022 find a model of a given compute budget best."""


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes, seconds, FLOPs, dollars; None if the device's numbers are not known."""

    job: Job
    tokens: float
    price_per_hour: float | None
    memory: RankMemory
    time: StepTime

    @property
    def trained_parameters(self) -> int:
        """All, or those of an adapter."""
        architecture = self.job.architecture
        if architecture.frozen:
            return architecture.sizes().adapter_parameters(architecture.model)
        return architecture.parameters

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens_per_step / self.time.seconds

    @property
    def flops_per_token(self) -> float:
        """Of all passes of a step over its tokens, as the trainer counts them; attention counted full."""
        return flops_per_token(self.job.passes, self.job.seq_length)

    @property
    def half_flops_per_token(self) -> float:
        """The same with causal attention counted half."""
        return flops_per_token(self.job.passes, self.job.seq_length, "half")

    @property
    def hardware_flops_per_token(self) -> float:
        """The first with what is computed again in backward."""
        length, recompute = self.job.seq_length, self.job.recompute
        again = sum(
            each.training * (model.flops_per_token(length, "full", recompute) - model.flops_per_token(length, "full"))
            for each in self.job.passes
            for model in (Architecture(each.model),)
        )
        return self.flops_per_token + again

    @property
    def mfu(self) -> float | None:
        """By the formula that the trainer reports (attention's whole square), against the data sheet's bf16 peak."""
        peak = self.job.device.matmul_flops
        return self.flops_per_token * self.tokens_per_second / (self.job.world * peak) if peak else None

    @property
    def fits(self) -> bool | None:
        return self.memory.total <= self.job.device.memory if self.job.device.is_gpu else None

    @property
    def days(self) -> float:
        return self.tokens / self.tokens_per_second / 86400

    @property
    def cost(self) -> float | None:
        return self.days * 24 * self.job.world * self.price_per_hour if self.price_per_hour else None

    @property
    def chinchilla_ratio(self) -> float:
        return self.tokens / self.job.architecture.parameters / CHINCHILLA_TOKENS

    def as_json(self) -> dict[str, Any]:
        """Plain values, all units in the names."""
        job, architecture = self.job, self.job.architecture
        rate = self.tokens_per_second / job.world
        return {
            "device": job.device.name,
            "devices": job.world,
            "layout": {
                "tensor": job.tensor,
                "pipeline": job.pipeline,
                "context": job.context,
                "context_mode": job.context_mode,
                "data": job.data,
                "expert": job.expert,
                "sequence": job.sequence,
                "keep_gathered": job.keep_gathered,
                "two_batch_overlap": job.two_batch_overlap,
                "zero": job.zero,
                "schedule": job.schedule,
                "virtual_stages": job.virtual_stages,
                "micro_batch_size": job.micro_batch_size,
                "micro_batches": job.micro_batches,
                "recompute": job.recompute,
            },
            "parameters": architecture.parameters,
            "trained_parameters": self.trained_parameters,
            "matmul_parameters": architecture.matmul_parameters,
            "parameters_per_rank": max(rank_parameters(job, rank) for rank in range(job.pipeline)),
            "flops_per_token": self.flops_per_token,
            "flops_formula": FORMULA_ADAPTER if architecture.frozen else FORMULA,
            "flops_per_token_half_causal": self.half_flops_per_token,
            "flops_formula_half_causal": FORMULA_HALF,
            "flops_per_token_with_recomputation": self.hardware_flops_per_token,
            "memory_bytes": dict(self.memory.parts),
            "memory_total_bytes": self.memory.total,
            "memory_worst_pipeline_rank": self.memory.pipeline_rank,
            "memory_worst_moment": self.memory.moment,
            "micro_batches_in_flight": self.memory.in_flight,
            "device_memory_bytes": job.device.memory or None,
            "fits": self.fits,
            "step_seconds": self.time.seconds,
            "step_parts_seconds": dict(self.time.parts),
            "pipeline_bubble": self.time.bubble,
            "tokens_per_step": job.tokens_per_step,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_device": rate,
            "tflops_per_device": self.flops_per_token * rate / 1e12,
            "mfu": self.mfu,
            "tokens": self.tokens,
            "days": self.days,
            "price_per_hour": self.price_per_hour,
            "cost": self.cost,
            "tokens_per_parameter": self.tokens / architecture.parameters,
            "chinchilla_ratio": self.chinchilla_ratio,
        }


def estimate(
    config: Config, devices: int, device: Device, tokens: float | None = None, price_per_hour: float | None = None
) -> Plan:
    """The plan of `config` on `devices` of a kind; `tokens` and the price have the recipe's and the table's defaults.

    Raises UserError for what the trainer would refuse, and where the vocabulary is not known.
    """
    if config.model.vocab_size == 0:
        raise UserError("model.vocab_size = 0 leaves the size to the tokenizer; give it: --model.vocab_size N")
    check_layout(config, devices)
    job = Job.of(config, devices, device)
    tokens = planned_tokens(config) if tokens is None else tokens
    price = price_per_hour if price_per_hour is not None else device.price or None
    return Plan(job, tokens, price, worst_rank(job), step_time(job))


def planned_tokens(config: Config) -> float:
    """Tokens of all the recipe's steps; answers count with their prompts, as long as they may be."""
    samples = config.samples_after(config.train.steps)
    if config.objective.data_format == "prompt":
        samples *= config.rollout.answers
    return float(samples * config.train.seq_length)
