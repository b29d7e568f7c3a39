"""What stands beside the trained model and comes before its update: reference, critic, reward model, rollouts, scores.

Frozen models hold weights alone; a critic holds all that a trained model does. Rollouts are planned as the longest
that the recipe allows: every row is full. Reading the prompts is a forward pass. Of every token that is written after
them a rank reads its weights once for each group of rows, and the group's keys and values so far; the rows go through
the pipeline in as many groups as it has ranks (`megalite.generation.generator`). The reward function is not timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megalite.planning.activations import inference_bytes
from megalite.planning.architecture import Architecture, vocabulary_rows
from megalite.planning.hardware import gather_seconds, link, transfer_link
from megalite.planning.job import Job, Rollout
from megalite.planning.stage_time import gather_parameters, makespan, matrix_seconds, pipeline_costs, product_seconds
from megalite.planning.states import frozen_bytes, rank_shares, rank_states
from megalite.schedule.ops import Plan
from megalite.schedule.schedules import forward_only

Forward = Callable[[Job], float]

LOGIT_BYTES = 12.0
"""Bytes a logit that drawing a token needs beside the logits: three fp32 forms (`megalite.generation.sampling`)."""


def critic_job(job: Job) -> Job:
    """The critic's updates: the same model with a scalar head."""
    return dataclasses.replace(job, reads="values")


def _reward_job(job: Job) -> Job:
    assert job.beside.reward_model is not None
    return dataclasses.replace(critic_job(job), architecture=job.beside.reward_model)


# Memory


def bytes_beside(job: Job, rank: int) -> dict[str, float]:
    """Bytes of the models beside the trained one on a pipeline rank, by name."""
    parts: dict[str, float] = {}
    if job.beside.reference and not job.beside.own_reference:
        plain = dataclasses.replace(job, architecture=Architecture(job.architecture.model))
        parts["reference"] = frozen_bytes(plain, rank)
    if job.beside.critic:
        parts["critic"] = sum(rank_states(critic_job(job), rank, working=False).values())
    if job.beside.reward_model is not None:
        parts["reward model"] = frozen_bytes(_reward_job(job), rank)
    return parts


def rollout_bytes(job: Job, rank: int) -> dict[str, float]:
    """Bytes that a pipeline rank holds while answers are written, beyond all models' states, by name."""
    rollout = job.rollout
    assert rollout is not None
    layers = sum(job.layers[stage] for stage in job.stages_of(rank))
    length = (rollout.prompt + rollout.tokens) / job.context
    cached = 1.0 * layers * job.layer.cached * job.element_bytes * rollout.batch * length
    prompts = _prompt_job(job)
    work = max(inference_bytes(kind) for stage in job.stages_of(rank) for kind, _ in prompts.kinds(stage))
    if job.stages - 1 in job.stages_of(rank):
        logits = prompts.micro_batch_size * job.architecture.model.vocab_size * (job.element_bytes + LOGIT_BYTES)
        work = max(work, logits)
    shared = sum(own for own, copies in rank_shares(job, rank) if copies > 1)  # what one rank alone holds is whole
    whole = job.element_bytes * shared if job.zero == 3 else 0.0
    return {"whole weights": whole, "keys and values": cached, "rollout at work": work}


# Time


def _groups(job: Job, rollout: Rollout) -> int:
    """Groups of rows that are in the pipeline at once."""
    return min(job.pipeline, rollout.batch)


def _prompt_job(job: Job) -> Job:
    """Reading the prompts of one batch: a forward pass of whole sequences, without ZeRO; a micro-batch is a group."""
    assert job.rollout is not None
    groups = _groups(job, job.rollout)
    return dataclasses.replace(
        job,
        seq_length=job.rollout.prompt,
        micro_batch_size=-(-job.rollout.batch // groups),
        micro_batches=groups,
        sequence=False,
        zero=0,
        reads="values",  # the output layer sees the last position alone
    )


def forward_seconds(job: Job) -> float:
    """A forward pass of all micro-batches of `job`, without gradients."""

    def plan(micro_batches: int) -> Plan:
        return forward_only(job.owners, micro_batches)

    return makespan(job, plan, *pipeline_costs(job))


def least_forward_seconds(job: Job) -> float:
    """A bound from below on `forward_seconds`: the busiest rank never idle."""
    seconds, _ = pipeline_costs(job)
    ranks = [sum(seconds["F"][stage] for stage in job.stages_of(rank)) for rank in range(job.pipeline)]
    return job.micro_batches * max(ranks)


def _layer_token_seconds(job: Job, rows: int, length: float) -> float:
    """One layer's forward pass for one token of each of `rows` rows, `length` tokens of which are cached."""
    layer, device, size = job.layer, job.device, job.element_bytes
    products = sum(
        max(size * matrix.elements / device.memory_bandwidth, matrix_seconds(job, matrix, rows))
        for matrix in layer.sizes.matrices
    )
    cache = 1.0 * size * layer.cached * length / job.context * rows / device.memory_bandwidth
    talk = 0.0
    if job.tensor > 1:  # an all-reduce after attention and one after the feed-forward
        moved = size * rows * layer.hidden
        talk = 4 * gather_seconds(moved, job.tensor, link(device, job.tensor, 1))
    return max(products + cache + talk, device.layer_overhead)


def _draw_seconds(job: Job, rows: int) -> float:
    """Output layer, drawing, and telling all ranks of the copy of the model."""
    device, model = job.device, job.architecture.model
    split = vocabulary_rows(job.architecture, job.tensor)
    product = max(
        job.element_bytes * split * model.hidden_size / device.memory_bandwidth,
        product_seconds(job, rows, model.hidden_size, split),
    )
    logits = rows * model.vocab_size * job.element_bytes
    gather = gather_seconds(logits, job.tensor, link(device, job.tensor, 1))
    drawn = rows * model.vocab_size * 2 * LOGIT_BYTES / device.memory_bandwidth
    told = link(device, job.tensor * job.pipeline, 1).latency if job.tensor * job.pipeline > 1 else 0.0
    return max(product + gather + drawn, device.layer_overhead) + told


def token_seconds(job: Job, rollout: Rollout) -> float:
    """The time of one token of each row of a batch, at the mean length of the cache."""
    groups = _groups(job, rollout)
    rows = -(-rollout.batch // groups)
    length = rollout.prompt + rollout.tokens / 2
    kinds = {kind.dense: kind for stage in range(job.stages) for kind, _ in job.kinds(stage)}
    layer = {dense: _layer_token_seconds(kind, rows, length) for dense, kind in kinds.items()}
    ranks = [
        sum(count * layer[kind.dense] for stage in job.stages_of(rank) for kind, count in job.kinds(stage))
        for rank in range(job.pipeline)
    ]
    ranks[job.owners[-1]] += _draw_seconds(job, rows)
    over = transfer_link(job.device, job.replicas * job.tensor)
    transfer = over.latency + rows * job.element_bytes * job.architecture.model.hidden_size / over.bandwidth
    # A group's next token needs its last one: groups that are too few for the ranks wait for themselves.
    alone = sum(ranks) + (job.stages * transfer if job.pipeline > 1 else 0.0)
    return max(groups * max(ranks), alone)


def rollout_parts(job: Job, forward: Forward) -> dict[str, float]:
    """Seconds of the answers of a step, by name."""
    rollout = job.rollout
    assert rollout is not None
    gather = 0.0
    if job.zero == 3 and job.replicas > 1:
        gather = max(sum(gather_parameters(job, stage) for stage in job.stages_of(r)) for r in range(job.pipeline))
    return {
        "rollout: gathering weights": gather,
        "rollout: reading prompts": rollout.batches * forward(_prompt_job(job)),
        "rollout: writing answers": rollout.batches * rollout.tokens * token_seconds(job, rollout),
    }


def parts_before_update(job: Job, forward: Forward = forward_seconds) -> dict[str, float]:
    """Seconds of all that comes before the updates of a step, by name; `forward` times a forward pass."""
    reads = job if job.reads != "loss" else dataclasses.replace(job, reads="logprobs")
    if job.rollout is None:
        return {"reference": forward(reads)} if job.beside.reference else {}
    scored = dataclasses.replace(reads, micro_batches=job.micro_batches * job.rollout.minibatches)
    scores = {"scores: policy": forward(scored)}
    if job.beside.reference:
        scores["scores: reference"] = scores["scores: policy"]
    if job.beside.critic:
        scores["scores: critic"] = forward(critic_job(scored))
    if job.beside.reward_model is not None:
        scores["scores: reward model"] = forward(_reward_job(scored))
    return rollout_parts(job, forward) | scores
