"""Time of a step: what one rank computes and moves for a stage, then the schedule's own simulation, then what follows.

A stage's forward and backward are sums over their products (FLOPs over a rate that falls for small matrices),
attention, element-wise work (bytes over the memory's rate) and collectives that nothing hides. The simulator of
`megalite.schedule` puts them on the pipeline ranks; gradients are reduced under the last backwards.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megalite.parallel.zero import BUCKET_ELEMENTS
from megalite.planning.architecture import LayerShare, vocabulary_rows
from megalite.planning.hardware import Link, gather_seconds, link, product_rate, transfer_link
from megalite.planning.job import Job
from megalite.planning.memory import stage_elements
from megalite.schedule.simulate import simulate

SMALL = 160.0
"""A GEMM reaches half its peak rate when a dimension is this small: partial tiles, pipelines not filled."""

HIDDEN_SHARE = 0.8
"""Fraction of compute time in which overlapped communication makes progress: the two compete for the device."""

STEP_OVERHEAD = 3e-3
"""Seconds per step for the all-reduce of norm and loss, the host's wait for it, and fetching data."""

SCORE_BYTES = (13.0, 22.0)
"""Bytes moved per attention score, forward and backward, if scores are materialised (with dropout)."""


class TimeParts(NamedTuple):
    """Seconds of one rank by kind; `launch` is time spent waiting for the host."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    data: float = 0.0
    launch: float = 0.0

    def plus(self, other: TimeParts) -> TimeParts:
        return TimeParts(*map(operator.add, self, other))

    def times(self, count: float) -> TimeParts:
        return TimeParts(*(count * value for value in self))

    @property
    def seconds(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class StageWork:
    """One stage and micro-batch: forward, backward for the input and for the weights."""

    forward: TimeParts
    input_gradient: TimeParts
    weight_gradient: TimeParts

    @property
    def backward(self) -> TimeParts:
        return self.input_gradient.plus(self.weight_gradient)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and their breakdown: means over the pipeline ranks.

    `bubble` is the share of the pipeline's time in which its ranks compute nothing, as the simulator and the report
    count it.
    """

    seconds: float
    parts: Mapping[str, float]
    bubble: float


def product_seconds(job: Job, rows: float, inner: float, outer: float) -> float:
    """Seconds of one product [rows, inner] x [inner, outer]."""
    rate = product_rate(job.device, job.element_bytes)
    if job.device.is_gpu:
        for size in (rows, inner, outer):
            rate *= size / (size + SMALL)
    return 2.0 * rows * inner * outer / rate


def _attention(job: Job, layer: LayerShare) -> tuple[float, float]:
    """Seconds of attention for one layer, forward and backward."""
    window = job.architecture.model.sliding_window or job.seq_length
    visible = min(window, job.seq_length) * (1 - min(window, job.seq_length) / (2 * job.seq_length))
    if job.practice.explicit_attention:
        width = layer.query // layer.queries
        product = 2 * layer.queries * job.micro_batch_size * product_seconds(job, job.seq_length, width, job.seq_length)
        scores = job.tokens * job.seq_length * layer.queries / job.device.memory_bandwidth
        return product + SCORE_BYTES[0] * scores, 2 * product + SCORE_BYTES[1] * scores
    flops = 4.0 * job.tokens * visible * layer.query
    if job.device.is_gpu:
        rate = job.device.matmul_flops / (1 if job.element_bytes == 2 else 16)
    else:
        rate = job.device.fp32_flops
    rate *= job.practice.attention
    forward, backward = job.device.attention_efficiency
    return flops / (rate * forward), 2.5 * flops / (rate * backward)


def _elementwise(job: Job, layer: LayerShare) -> tuple[float, float]:
    """Seconds of norms, rotation, SwiGLU and sums, forward and backward: elements read and written over the rate."""
    hidden = layer.hidden / job.split
    forward = 9 * hidden + 2 * (layer.query + layer.key) + 3 * layer.ffn
    backward = 14 * hidden + 4 * layer.query + 6 * layer.key + 5 * layer.ffn
    scale = job.practice.elementwise * job.element_bytes * job.tokens / job.device.memory_bandwidth
    return forward * scale, backward * scale


def _tensor_link(job: Job) -> Link:
    return link(job.device, job.tensor, 1)


def _exchange(job: Job) -> float:
    """Seconds of one all-gather or reduce-scatter of a whole activation over the tensor ranks."""
    size = job.tokens * job.architecture.model.hidden_size * job.element_bytes
    return gather_seconds(size, job.tensor, _tensor_link(job))


def _exposed(communication: float, beside: float) -> float:
    return max(0.0, communication - HIDDEN_SHARE * beside)


def _tensor_talk(job: Job, products: list[float]) -> tuple[float, float, float]:
    """Exposed seconds of tensor-parallel communication in a layer: forward, input gradient, weight gradient.

    As `megalite.parallel.linear` does it: a column-parallel layer's input is gathered again under the product of its
    input gradient, whose sum runs under that of the weight gradient. In forward, and where the gradient of a
    row-parallel layer is gathered, nothing runs beside. Of weight gradients that are put off, each gathers on its own.
    """
    exchange, overlaps = _exchange(job), job.practice.overlaps_tensor
    pairs = list(zip(products, job.layer.sizes.matrices, strict=True))
    columns, rows = ([own for own, matrix in pairs if matrix.rows is split] for split in (False, True))

    def hidden(seconds: float, beside: float) -> float:
        return max(job.practice.hiding_cost * seconds, _exposed(seconds, beside))

    def all_hidden(seconds: float, products: Iterable[float], hides: bool) -> float:
        return sum(hidden(seconds, own) if hides else seconds for own in products)

    # Into and out of each of the two blocks; an all-reduce is both in one.
    forward = all_hidden(exchange, products, overlaps == "all")
    hides = overlaps != "none" and not job.splits_backward
    if job.split == 1:  # the sums of the input gradients alone, as all-reduces
        summed = all_hidden(2 * exchange, columns, hides)
        return (forward, summed, 0.0) if job.splits_backward else (forward, 0.0, summed)
    gathered = all_hidden(exchange, rows, overlaps == "all")
    once = all_hidden(exchange, columns, hides)
    if job.splits_backward:
        return forward, gathered + once, len(products) * exchange
    return forward, gathered + once, once


def layer_work(job: Job) -> StageWork:
    """One layer and micro-batch."""
    layer = job.layer
    matrices = layer.sizes.matrices
    products = [product_seconds(job, job.tokens, matrix.inputs, matrix.outputs) for matrix in matrices]
    total = sum(products)
    attention, elementwise = _attention(job, layer), _elementwise(job, layer)
    talk_forward, talk_input, talk_weight = _tensor_talk(job, products)
    weight_sum = layer.sizes.elements * job.practice.gradient_bytes / job.device.memory_bandwidth
    forward = TimeParts(total, attention[0], elementwise[0], talk_forward)
    input_gradient = TimeParts(total, attention[1], elementwise[1], talk_input)
    weight_gradient = TimeParts(total, 0.0, weight_sum, talk_weight)
    if job.recompute == "full":
        input_gradient = input_gradient.plus(forward)
    elif job.recompute == "selective":
        input_gradient = input_gradient.plus(TimeParts(0.0, attention[0], 0.4 * elementwise[0]))
    return StageWork(forward, input_gradient, weight_gradient)


def _loss_work(job: Job) -> StageWork:
    """Output layer and loss of one micro-batch."""
    hidden, rows = job.architecture.model.hidden_size, vocabulary_rows(job.architecture, job.tensor)
    product = product_seconds(job, job.tokens, hidden, rows)
    weight_sum = rows * hidden * job.practice.gradient_bytes / job.device.memory_bandwidth
    moved = job.tokens * rows * job.practice.logit_bytes / job.device.memory_bandwidth
    exchange = _exchange(job)
    forward, gradient = TimeParts(product, 0.0, moved, exchange), TimeParts(product, 0.0, 0.0, exchange)
    weights = TimeParts(product, 0.0, weight_sum)
    if job.practice.loss_in_forward:
        return StageWork(forward.plus(gradient).plus(weights), TimeParts(), TimeParts())
    return StageWork(forward, gradient, weights)


def _with_launch(work: TimeParts, floor: float) -> TimeParts:
    return work._replace(launch=max(0.0, floor - work.seconds))


def stage_work(job: Job, stage: int) -> StageWork:
    """One stage and micro-batch, what ZeRO moves for each micro-batch included."""
    layers = job.layers[stage]
    layer, overhead = layer_work(job), job.device.layer_overhead * layers
    recomputes = job.recompute == "full"
    forward, inputs = layer.forward.times(layers), layer.input_gradient.times(layers)
    weights = layer.weight_gradient.times(layers)
    forward = _with_launch(forward, overhead)
    inputs = _with_launch(inputs, overhead * (2 if recomputes else 1))
    weights = _with_launch(weights, overhead / 2)
    if stage == job.stages - 1:
        loss = _loss_work(job)
        forward, inputs = forward.plus(loss.forward), inputs.plus(loss.input_gradient)
        weights = weights.plus(loss.weight_gradient)
    if stage == 0:
        forward = forward.plus(TimeParts(tensor=_exchange(job)))
        weights = weights.plus(TimeParts(tensor=_exchange(job) if job.split > 1 else 0.0))
    if job.zero >= 2 and job.data > 1:  # gradients are reduced for each micro-batch, and weights gathered
        talk = _reduce_gradients(job, stage)
        if job.zero == 3:
            gather = _gather_parameters(job, stage)
            first = gather / max(1, layers)  # nothing to hide the first layer's under
            forward = forward.plus(TimeParts(data=max(first, _exposed(gather, forward.seconds))))
            talk += gather
        inputs = inputs.plus(TimeParts(data=_exposed(talk, inputs.seconds + weights.seconds)))
    return StageWork(forward, inputs, weights)


def stage_works(job: Job) -> list[StageWork]:
    """The work of every stage; of stages that are alike, once computed."""
    known: dict[object, StageWork] = {}
    for stage in range(job.stages):
        if job.alike(stage) not in known:
            known[job.alike(stage)] = stage_work(job, stage)
    return [known[job.alike(stage)] for stage in range(job.stages)]


def _data_link(job: Job) -> Link:
    over = link(job.device, job.data, job.tensor)
    efficiency = job.practice.gather_efficiency if job.zero == 3 else 1.0
    return dataclasses.replace(over, bandwidth=over.bandwidth * efficiency)


def _gather_parameters(job: Job, stage: int) -> float:
    """All-gather of a stage's weights over the data-parallel ranks."""
    return gather_seconds(job.element_bytes * stage_elements(job, stage), job.data, _data_link(job))


def _reduce_gradients(job: Job, stage: int) -> float:
    """Reduction of a stage's fp32 gradients, bucket by bucket; an all-reduce is two of them."""
    over, elements = _data_link(job), stage_elements(job, stage)
    buckets = -(-elements // BUCKET_ELEMENTS)
    once = gather_seconds(4.0 * elements, job.data, over) + (buckets - 1) * over.latency
    return once * (2 if job.zero == 0 else 1) if job.data > 1 else 0.0


def _after_backward(job: Job, works: list[StageWork]) -> tuple[float, float]:
    """(communication that is not hidden, optimizer) of the first pipeline rank, whose backwards are the last; seconds.

    The reductions run under the last backwards, the new parameters' gathering under the next step's first forwards.
    """
    stages = job.stages_of(0)
    elements = sum(stage_elements(job, stage) for stage in stages)
    exposed = 0.0
    if job.zero < 2:
        reduce = sum(_reduce_gradients(job, stage) for stage in stages)
        last_bucket = reduce * min(1.0, BUCKET_ELEMENTS / elements)
        exposed = max(last_bucket, _exposed(reduce, sum(works[stage].backward.seconds for stage in stages)))
    if job.zero in (1, 2):
        gather = sum(_gather_parameters(job, stage) for stage in stages)
        exposed += _exposed(gather, sum(works[stage].forward.seconds for stage in stages))
    updated = elements / (job.data if job.zero >= 1 else 1)
    # AdamW reads gradient, both moments and weights, writes all but the gradient; the norm reads once more; all
    # gradients are zeroed before the next step.
    moved = updated * (32 + job.element_bytes) + 4.0 * elements
    return exposed, moved / job.device.memory_bandwidth


def pipeline_costs(job: Job, works: list[StageWork] | None = None) -> tuple[dict[str, list[float]], float]:
    """(seconds of each compute kind by stage, seconds of one transfer between stages) of a micro-batch."""
    works = stage_works(job) if works is None else works
    costs = {
        "F": [work.forward.seconds for work in works],
        "B": [work.backward.seconds for work in works],
        "I": [work.input_gradient.seconds for work in works],
        "W": [work.weight_gradient.seconds for work in works],
    }
    over = transfer_link(job.device, job.data * job.tensor)
    activation = job.tokens * job.element_bytes * job.architecture.model.hidden_size / job.split
    return costs, over.latency + activation / over.bandwidth


def _makespan(job: Job, costs: Mapping[str, list[float]], transfer: float) -> float:
    """Of the whole step; a long one is a short one and the rest of its steady state, which repeats every p."""
    short = 6 * job.pipeline
    if job.micro_batches <= short + job.pipeline:
        return simulate(job.plan(), costs, transfer).makespan
    whole, more = divmod(job.micro_batches - short, job.pipeline)
    first = simulate(job.plan(short), costs, transfer).makespan
    second = simulate(job.plan(short + job.pipeline), costs, transfer).makespan
    return first + (second - first) * (whole + more / job.pipeline)


def _rank_works(job: Job, works: list[StageWork]) -> list[TimeParts]:
    """The work of each pipeline rank for one micro-batch."""
    return [
        functools.reduce(
            TimeParts.plus, (works[stage].forward.plus(works[stage].backward) for stage in job.stages_of(rank))
        )
        for rank in range(job.pipeline)
    ]


def least_step_seconds(job: Job) -> float:
    """A bound from below on `step_time`, without simulation: the busiest rank never idle."""
    works = stage_works(job)
    busiest = max(work.seconds for work in _rank_works(job, works))
    return busiest * job.micro_batches + sum(_after_backward(job, works)) + STEP_OVERHEAD


def step_time(job: Job) -> StepTime:
    """Predict one step of the full global batch."""
    works = stage_works(job)
    makespan = _makespan(job, *pipeline_costs(job, works))
    work = functools.reduce(TimeParts.plus, _rank_works(job, works)).times(job.micro_batches / job.pipeline)
    exposed, optimizer = _after_backward(job, works)
    idle = max(0.0, makespan - work.seconds)
    parts = {
        "matrix products": work.products,
        "attention": work.attention,
        "element-wise": work.elementwise,
        "waiting for the host": work.launch,
        "tensor-parallel communication": work.tensor,
        "pipeline idle and transfers": idle,
        "data-parallel communication": work.data + exposed,
        "optimizer": optimizer,
        "agreement": STEP_OVERHEAD,
    }
    seconds = makespan + exposed + optimizer + STEP_OVERHEAD
    return StepTime(seconds, parts, idle / makespan)
