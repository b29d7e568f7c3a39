"""Errors as trainers have had them, each put into one running process: a context that is given the trainer and a layer.

What is changed belongs to this trainer, or is restored: workers serve other tests afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function

from megalite.mesh import DONE
from megalite.parallel import linear
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.engine import PipelineEngine
from megalite.train import trainer as trainer_module


class _Skewed(Function):
    """The identity whose backward multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


def blocks(trainer: Any, layer: int) -> Iterator[Any]:
    """The layer, where this rank holds it."""
    for stage in trainer.stages.values():
        for block in stage.layers:
            if block.attention.layer == layer:
                yield block


def parameters(trainer: Any, name: str) -> Iterator[tuple[Any, Any]]:
    for stage in trainer.stages.values():
        for parameter in stage.parameters():
            yield from ((parameter, box) for box in parameter.placement.boxes if box.name == name)


def fill(trainer: Any, name: str, change: Any) -> None:
    """Change a loaded weight."""

    def write(parameter: Any) -> None:
        values = parameter.detach().clone()
        for box in parameter.placement.boxes:
            if box.name == name:
                change(box.view(values), box)
        parameter.copy_(values)

    with torch.no_grad():
        trainer.fill(write)
    for segment in trainer.segments:
        segment.take_parameters()


# Kernels


@contextlib.contextmanager
def rope_turned(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        kernels = block.attention.kernels
        block.attention.kernels = dataclasses.replace(
            kernels,
            rope=lambda q, k, cos, sin, rope=kernels.rope: rope(q, k, cos, -sin),
            rope_qkv=lambda qkv, cos, sin, *heads, rope=kernels.rope_qkv: rope(qkv, cos, -sin, *heads),
        )
    yield


@contextlib.contextmanager
def attention_scale(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        block.attention.scores = dict(block.attention.scores, scale=block.attention.dim**-0.5 * 1.05)
    yield


@contextlib.contextmanager
def attention_window(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        block.attention.window = 4
    yield


@contextlib.contextmanager
def attention_backward(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        attend = block.attention.kernels.attention

        def wrong(q: Tensor, k: Tensor, v: Tensor, attend: Any = attend, **options: Any) -> Tensor:
            return attend(q, k, _Skewed.apply(v, 0.99), **options)

        block.attention.kernels = dataclasses.replace(block.attention.kernels, attention=wrong)
    yield


@contextlib.contextmanager
def swiglu_forward(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        inner = block.feed_forward.activation
        block.feed_forward.activation = lambda x, inner=inner: inner(x) * 1.001
    yield


@contextlib.contextmanager
def swiglu_backward(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        inner = block.feed_forward.activation
        block.feed_forward.activation = lambda x, inner=inner: inner(_Skewed.apply(x, 1.01))
    yield


@contextlib.contextmanager
def norm_eps(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        block.attention_norm.eps *= 1.5
    yield


@contextlib.contextmanager
def norm_backward(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        norm = block.ffn_norm
        inner = norm.kernels.add_rms_norm

        def wrong(x: Tensor, residual: Tensor, weight: Tensor, eps: float, inner: Any = inner) -> Any:
            total, y = inner(x, residual, weight, eps)
            return total, _Skewed.apply(y, 1.02)

        norm.kernels = dataclasses.replace(norm.kernels, add_rms_norm=wrong)
    yield


# Layers


class _Unsummed(TensorRegion):
    """A tensor region that forgets its sum."""

    def sum_start(self, partial: Tensor) -> Any:
        if not self.sequence:
            return partial, DONE
        length = partial.shape[0] // self.split
        return partial[self.group.index * length :][:length].contiguous(), DONE


def _unsummed(region: TensorRegion) -> TensorRegion:
    return _Unsummed(region.group, region.sequence)


@contextlib.contextmanager
def row_sum_missing(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        block.attention.out.region = _unsummed(block.attention.out.region)
    yield


@contextlib.contextmanager
def column_gradient_sum_missing(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        block.feed_forward.gate_up.region = _unsummed(block.feed_forward.gate_up.region)
    yield


@contextlib.contextmanager
def residual_scaled(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        block.multiplier = 1.02
    yield


@contextlib.contextmanager
def vocabulary_shifted(trainer: Any, layer: int) -> Iterator[None]:
    for stage in trainer.stages.values():
        if stage.embedding is not None and stage.embedding.first:
            stage.embedding.first += 1
    yield


@contextlib.contextmanager
def weight_gradient_doubled(trainer: Any, layer: int) -> Iterator[None]:
    inner = linear.add_weight_gradient
    wrong = {id(block.feed_forward.down.weight) for block in blocks(trainer, layer)}

    def add(weight: Any, grad: Tensor, inputs: Tensor, *rest: Any) -> Any:
        return inner(weight, 2 * grad if id(weight) in wrong else grad, inputs, *rest)

    with mock.patch.object(linear, "add_weight_gradient", add):
        yield


@contextlib.contextmanager
def norm_gradient_not_summed(trainer: Any, layer: int) -> Iterator[None]:
    for buckets in trainer.buckets.values():
        buckets._replicated = []
    yield


@contextlib.contextmanager
def gradient_reduction_missing(trainer: Any, layer: int) -> Iterator[None]:
    """The last bucket of the first stage's matrices is not reduced over the data ranks."""
    for number, buckets in trainer.buckets.items():
        if number == 0:
            bucket = [bucket for bucket in buckets.buckets if bucket.role == "matrix"][-1]
            bucket.group = SimpleNamespace(
                size=1,
                index=0,
                all_reduce=lambda tensor: DONE,
                reduce_scatter=lambda part, whole: (part.copy_(whole[: part.numel()]), DONE)[1],
            )
    yield


# Loss


@contextlib.contextmanager
def z_loss_missing(trainer: Any, layer: int) -> Iterator[None]:
    if trainer.last_stage is not None:
        trainer.last_stage.head.z_loss = 0.0
    yield


@contextlib.contextmanager
def local_normalisation(trainer: Any, layer: int) -> Iterator[None]:
    """Divided by this rank's count of labels times the ranks, as if all had as many."""
    ranks, alone, count = trainer.mesh.samples_size, trainer.mesh.alone, trainer_module._Count
    with mock.patch.object(trainer_module, "_Count", lambda own, world: count(own * ranks, alone)):
        yield


@contextlib.contextmanager
def head_gradient_not_summed(trainer: Any, layer: int) -> Iterator[None]:
    if trainer.last_stage is not None:
        trainer.last_stage.head.region = _unsummed(trainer.last_stage.head.region)
    yield


# Optimizer


@contextlib.contextmanager
def _rule(trainer: Any, **fields: float) -> Iterator[None]:
    trainer.optimizer.rule.config = dataclasses.replace(trainer.optimizer.rule.config, **fields)
    yield


def no_weight_decay(trainer: Any, layer: int) -> Any:
    return _rule(trainer, weight_decay=0.0)


def other_beta2(trainer: Any, layer: int) -> Any:
    return _rule(trainer, beta2=0.999)


def other_eps(trainer: Any, layer: int) -> Any:
    return _rule(trainer, eps=1e-3)


@contextlib.contextmanager
def step_count_from_zero(trainer: Any, layer: int) -> Iterator[None]:
    trainer.optimizer.set_step_count(1)
    yield


@contextlib.contextmanager
def norm_counts_replicas(trainer: Any, layer: int) -> Iterator[None]:
    """Boxes that other ranks own are counted as well."""
    trainer.norm._owned = [segment.gradient for segment in trainer.optimizer.segments]
    yield


@contextlib.contextmanager
def not_clipped(trainer: Any, layer: int) -> Iterator[None]:
    config = trainer.config
    trainer.config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_grad=0.0))
    yield


@contextlib.contextmanager
def weights_not_gathered(trainer: Any, layer: int) -> Iterator[None]:
    """Other ranks' shards of the matrices stay as they were before the update."""
    for buckets in trainer.buckets.values():
        for bucket in buckets.buckets:
            if bucket.role == "matrix":
                bucket.gather_parameters = lambda: None
    yield


# Schedules


@contextlib.contextmanager
def warmup_too_early(trainer: Any, layer: int) -> Iterator[None]:
    from megalite.optim import lr_schedule

    inner = lr_schedule.learning_rate
    with mock.patch.object(lr_schedule, "learning_rate", lambda step, config: inner(step + 1, config)):
        yield


@contextlib.contextmanager
def delayed_gradient_lost(trainer: Any, layer: int) -> Iterator[None]:
    """A zero-bubble schedule that never makes the weight gradients of its last micro-batch on the last stage."""
    for number, buckets in trainer.buckets.items():
        if number == trainer.stage_count - 1:
            inner = buckets.run_delayed
            buckets.run_delayed = lambda micro, inner=inner, buckets=buckets: (
                inner(micro) if micro != 1 else [parameter.gradient_added() for parameter in buckets._matrices]
            )
    yield


@contextlib.contextmanager
def stale_activation(trainer: Any, layer: int) -> Iterator[None]:
    """The second stage reads its first micro-batch again in place of the second."""
    inner, kept = PipelineEngine._forward, {}

    def forward(engine: Any, op: Any, *args: Any) -> None:
        if op.stage == 1 and op.micro in (0, 1):
            hidden, work = engine._inputs[op.stage, op.micro]
            if work is not None:
                work.wait()
            kept[op.micro] = hidden.detach().clone()
            engine._inputs[op.stage, op.micro] = (kept[0].clone(), None)
        inner(engine, op, *args)

    with mock.patch.object(PipelineEngine, "_forward", forward):
        yield


# Data and conversion


@contextlib.contextmanager
def wrong_samples(trainer: Any, layer: int) -> Iterator[None]:
    yield


def dealt(batches: list[Any], trainer: Any) -> list[Any]:
    """The micro-batches of the last data rank in another order."""
    return batches[::-1] if trainer.mesh.samples_index == trainer.mesh.samples_size - 1 else batches


@contextlib.contextmanager
def queries_not_permuted(trainer: Any, layer: int) -> Iterator[None]:
    """Rows of each head in the order of the other form of rotary embedding."""

    def change(view: Tensor, box: Any) -> None:
        dim = trainer.config.model.head_dim
        view.copy_(view.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).reshape(view.shape))

    fill(trainer, f"model.layers.{layer}.self_attn.q_proj.weight", change)
    yield


@contextlib.contextmanager
def output_left_fresh(trainer: Any, layer: int) -> Iterator[None]:
    fill(trainer, "lm_head.weight", lambda view, box: view.mul_(1.001))
    yield


@contextlib.contextmanager
def rows_of_another_rank(trainer: Any, layer: int) -> Iterator[None]:
    """The context ranks rotate by the positions of the first one."""
    for stage in trainer.stages.values():
        inner, context = stage.positions, stage.context

        def positions(length: int, start: int, p: Any, d: Any, rows: Any = None, inner: Any = inner, c: Any = context):
            return inner(length, start, p, d, None if rows is None else c.rows(length, 0))

        stage.positions = positions
    yield


@contextlib.contextmanager
def router_not_normalised(trainer: Any, layer: int) -> Iterator[None]:
    for block in blocks(trainer, layer):
        router = block.feed_forward.router
        router.model = dataclasses.replace(router.model, router_renormalise=not router.model.router_renormalise)
    yield
