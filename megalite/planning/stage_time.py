"""Time of a stage: what one rank computes and moves for a micro-batch, and what the schedule makes of it.

A stage's forward and backward are sums over their products (FLOPs over a rate that falls for small matrices),
attention, element-wise work (bytes over the memory's rate) and collectives that nothing hides. The simulator of
`megalite.schedule` puts them on the pipeline ranks.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megalite.parallel.zero import BUCKET_ELEMENTS
from megalite.planning.activations import NORMS
from megalite.planning.architecture import LayerShare, vocabulary_rows
from megalite.planning.hardware import (
    Link,
    exchange_seconds,
    gather_seconds,
    link,
    ring_link,
    transfer_link,
)
from megalite.planning.job import Job
from megalite.planning.states import stage_shares
from megalite.planning.tensor_time import (
    exposed,
    head_exchange,
    matrix_seconds,
    pieced_seconds,
    product_seconds,
    rows_seconds,
    stream_exchange,
    tensor_link,
    tensor_talk,
)
from megalite.planning.two_batches import two_batch_talk
from megalite.schedule.ops import Plan
from megalite.schedule.simulate import simulate

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
    context: float = 0.0
    experts: float = 0.0

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


def _attention(job: Job, layer: LayerShare) -> tuple[float, float]:
    """Seconds of attention for one layer, forward and backward."""
    windows = [min(window or job.seq_length, job.seq_length) for window in job.architecture.model.windows]
    visible = sum(window * (1 - window / (2 * job.seq_length)) for window in windows) / len(windows)  # mean of layers
    if job.practice.explicit_attention:
        width = layer.query // layer.queries
        product = 2 * layer.queries * job.micro_batch_size * product_seconds(job, job.seq_length, width, job.seq_length)
        scores = job.tokens * job.seq_length * layer.queries / job.device.memory_bandwidth
        return product + SCORE_BYTES[0] * scores, 2 * product + SCORE_BYTES[1] * scores
    flops = 4.0 * job.tokens * visible * (layer.query if layer.latent is None else layer.latent.wide)
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
    further_norms = NORMS.get(job.architecture.model.block, 2) - 2
    forward = (9 + 2 * further_norms) * hidden + 2 * (layer.query + layer.key) + 3 * layer.ffn
    backward = (14 + 3 * further_norms) * hidden + 4 * layer.query + 6 * layer.key + 5 * layer.ffn
    if layer.latent is not None:  # heads are put together of their parts, and values padded
        latents = (layer.latent.queries + layer.latent.keys) / job.split
        forward += 2 * layer.key + 2 * layer.mixed + 2 * latents
        backward += 2 * layer.key + 2 * layer.mixed + 4 * latents
    forward += layer.copies * (4 * layer.hidden + 4 * layer.expert_ffn)  # rows are moved, and moved back
    backward += layer.copies * (4 * layer.hidden + 8 * layer.expert_ffn)
    scale = job.practice.elementwise * job.element_bytes * job.tokens / job.device.memory_bandwidth
    return forward * scale, backward * scale


def _expert_exchange(job: Job, layer: LayerShare) -> float:
    """Exposed seconds in which a sparse layer's rows travel to their experts and back, in one direction of the pass;
    shared experts hide the way there."""
    once = rows_seconds(job)
    shared = 3 * product_seconds(job, job.tokens, layer.hidden, layer.ffn) if layer.ffn else 0.0
    return exposed(once, shared) + once


def _context_talk(job: Job, attention: tuple[float, float]) -> tuple[float, float]:
    """Exposed seconds of context-parallel communication in a layer, forward and backward.

    As `megalite.parallel.context_attention` does it: gather waits for keys and values, in backward again, and for the
    sum of their gradients; ring moves them under attention to those of the rank before, gradients in fp32 a step
    later; ulysses waits for its exchanges of heads.
    """
    ranks, layer = job.context, job.layer
    if ranks == 1:
        return 0.0, 0.0
    own = 2.0 * job.tokens * layer.key * job.element_bytes  # keys and values of this rank's tokens
    if job.context_mode == "gather":
        once = gather_seconds(own * ranks, ranks, link(job.device, ranks, job.tensor))
        return once, 2 * once
    if job.context_mode == "ulysses":
        heads, kvs = layer.queries // ranks, -(-layer.kvs // ranks)
        width = layer.query / layer.queries
        widths = (ranks * (heads + 2 * kvs) * width, float(layer.query))  # there, and back
        sizes = [job.tokens * wide * job.element_bytes for wide in widths]
        once = sum(exchange_seconds(size, ranks, job.device, job.tensor) for size in sizes)
        return once, once
    over = ring_link(job.device, ranks, job.tensor)
    step = over.latency + own / over.bandwidth
    summed = over.latency + 8.0 * job.tokens * layer.key / over.bandwidth
    cost = job.practice.hiding_cost
    forward = (ranks - 1) * max(cost * step, exposed(step, attention[0] / ranks))
    backward = (ranks - 1) * max(cost * (step + summed), exposed(step + summed, attention[1] / ranks)) + summed
    return forward, backward


def _adapter_work(job: Job, layer: LayerShare) -> TimeParts:
    """One pass through an adapter's matrices: their products, what they are added to, and what is sent between them."""
    matrices = layer.sizes.adapter
    if not matrices:
        return TimeParts()
    products = sum(product_seconds(job, job.tokens, matrix.inputs, matrix.outputs) for matrix in matrices)
    widest = sum(max(matrix.inputs, matrix.outputs) for matrix in matrices)
    elementwise = 2.0 * job.tokens * job.element_bytes * widest / job.device.memory_bandwidth
    talk = 0.0
    if job.tensor > 1:
        narrow = sum(min(matrix.inputs, matrix.outputs) for matrix in matrices) / 2
        times = 1 if job.split > 1 else 2
        talk = times * gather_seconds(job.tokens * job.element_bytes * narrow, job.tensor, tensor_link(job))
    return TimeParts(products, elementwise=elementwise, tensor=talk)


def layer_work(job: Job) -> StageWork:
    """One layer and micro-batch."""
    layer = job.layer
    matrices = layer.sizes.matrices
    total = sum(matrix_seconds(job, matrix, job.tokens) for matrix in matrices)
    pieced = sum(pieced_seconds(job, matrix) for matrix in matrices)
    attention, elementwise = _attention(job, layer), _elementwise(job, layer)
    talk_forward, talk_input, talk_weight = tensor_talk(job, attention[1])
    context = _context_talk(job, attention)
    added = _adapter_work(job, layer)
    trained, weights = layer.sizes.elements, total
    if job.architecture.frozen:
        trained, weights = layer.sizes.adapter_elements, added.products
    weight_sum = trained * job.practice.gradient_bytes / job.device.memory_bandwidth
    moved = moved_forward = _expert_exchange(job, layer)
    if job.two_batch_overlap:
        talk_forward, moved_forward = two_batch_talk(job, attention[0])
    multiplied = total if job.two_batch_overlap else pieced
    forward = TimeParts(
        multiplied, attention[0], elementwise[0], talk_forward, context=context[0], experts=moved_forward
    )
    input_gradient = TimeParts(pieced, attention[1], elementwise[1], talk_input, context=context[1], experts=moved)
    forward, input_gradient = forward.plus(added), input_gradient.plus(added)
    weight_gradient = TimeParts(weights, 0.0, weight_sum, talk_weight)
    if job.recompute == "full":
        input_gradient = input_gradient.plus(forward)
    elif job.recompute == "selective":
        input_gradient = input_gradient.plus(TimeParts(0.0, attention[0], 0.4 * elementwise[0], context=context[0]))
    return StageWork(forward, input_gradient, weight_gradient)


def _output_work(job: Job) -> StageWork:
    """Output layer and loss of one micro-batch; a scalar head takes next to nothing.

    Where log-probabilities are read, backward makes the logits again.
    """
    if job.head == "scalar":
        gathered = TimeParts(tensor=stream_exchange(job) if job.split > 1 else 0.0)
        return StageWork(gathered, TimeParts(), TimeParts())
    hidden, rows = job.architecture.model.hidden_size, vocabulary_rows(job.architecture, job.tensor)
    product = product_seconds(job, job.tokens, hidden, rows)
    weight_sum = rows * hidden * job.practice.gradient_bytes / job.device.memory_bandwidth
    moved = job.tokens * rows * job.practice.logit_bytes / job.device.memory_bandwidth
    exchange = head_exchange(job, product)
    weights = TimeParts() if job.architecture.frozen else TimeParts(product, 0.0, weight_sum)
    if job.reads == "logprobs":
        forward = TimeParts(product, 0.0, moved / 2, exchange)
        return StageWork(forward, TimeParts(2 * product, 0.0, moved, 2 * exchange), weights)
    forward, gradient = TimeParts(product, 0.0, moved, exchange), TimeParts(product, 0.0, 0.0, exchange)
    if job.practice.loss_in_forward:
        return StageWork(forward.plus(gradient).plus(weights), TimeParts(), TimeParts())
    return StageWork(forward, gradient, weights)


def _with_launch(work: TimeParts, floor: float) -> TimeParts:
    return work._replace(launch=max(0.0, floor - work.seconds))


def _stage_work(job: Job, stage: int, of_layers: dict[bool, StageWork]) -> StageWork:
    """One stage and micro-batch, what ZeRO moves for each micro-batch included. `of_layers` keeps the work of a layer
    of each kind, which is the same in all stages."""
    layers = job.layers[stage]
    overhead, recomputes = job.device.layer_overhead * layers, job.recompute == "full"
    forward = inputs = weights = TimeParts()
    for kind, count in job.kinds(stage):
        if kind.dense not in of_layers:
            of_layers[kind.dense] = layer_work(kind)
        work = of_layers[kind.dense]
        forward, inputs = forward.plus(work.forward.times(count)), inputs.plus(work.input_gradient.times(count))
        weights = weights.plus(work.weight_gradient.times(count))
    forward = _with_launch(forward, overhead)
    inputs = _with_launch(inputs, overhead * (2 if recomputes else 1))
    weights = _with_launch(weights, overhead / 2)
    if stage == job.stages - 1:
        output = _output_work(job)
        forward, inputs = forward.plus(output.forward), inputs.plus(output.input_gradient)
        weights = weights.plus(output.weight_gradient)
    if stage == 0:
        forward = forward.plus(TimeParts(tensor=stream_exchange(job)))
        weights = weights.plus(TimeParts(tensor=stream_exchange(job) if job.split > 1 else 0.0))
    if job.zero >= 2 and job.replicas > 1:  # gradients are reduced for each micro-batch, and weights gathered
        talk = reduce_gradients(job, stage)
        if job.zero == 3:
            gather = gather_parameters(job, stage)
            first = gather / max(1, layers)  # nothing to hide the first layer's under
            forward = forward.plus(TimeParts(data=max(first, exposed(gather, forward.seconds))))
            talk += gather
        inputs = inputs.plus(TimeParts(data=exposed(talk, inputs.seconds + weights.seconds)))
    return StageWork(forward, inputs, weights)


def stage_works(job: Job) -> list[StageWork]:
    """The work of every stage; of stages that are alike, once computed."""
    known: dict[object, StageWork] = {}
    of_layers: dict[bool, StageWork] = {}
    works = []
    for stage in range(job.stages):
        kind = job.alike(stage)
        if kind not in known:
            known[kind] = _stage_work(job, stage, of_layers)
        works.append(known[kind])
    return works


def _data_link(job: Job, expert: int = 1) -> Link:
    """Of the ranks that hold the same weights, or the same one of `expert` shares of the experts."""
    over = link(job.device, job.replicas // expert, job.tensor * expert)
    efficiency = job.practice.gather_efficiency if job.zero == 3 else 1.0
    return dataclasses.replace(over, bandwidth=over.bandwidth * efficiency)


def gather_parameters(job: Job, stage: int, *, trained: bool = False) -> float:
    """All-gather of a stage's weights (or of those alone that are trained) over the data-parallel ranks."""
    return sum(
        gather_seconds(job.element_bytes * elements, ranks, _data_link(job, job.replicas // ranks))
        for elements, ranks in stage_shares(job, stage, trained=trained)
    )


def reduce_gradients(job: Job, stage: int) -> float:
    """Reduction of a stage's fp32 gradients, bucket by bucket; an all-reduce is two of them."""
    once = 0.0
    for elements, ranks in stage_shares(job, stage, trained=True):
        over = _data_link(job, job.replicas // ranks)
        buckets = -(-elements // BUCKET_ELEMENTS) if ranks > 1 else 0
        once += gather_seconds(4.0 * elements, ranks, over) + max(0, buckets - 1) * over.latency
    return once * (2 if job.zero == 0 else 1) if job.replicas > 1 else 0.0


def pipeline_costs(job: Job, works: list[StageWork] | None = None) -> tuple[dict[str, list[float]], float]:
    """(seconds of each compute kind by stage, seconds of one transfer between stages) of a micro-batch."""
    works = stage_works(job) if works is None else works
    costs = {
        "F": [work.forward.seconds for work in works],
        "B": [work.backward.seconds for work in works],
        "I": [work.input_gradient.seconds for work in works],
        "W": [work.weight_gradient.seconds for work in works],
    }
    over = transfer_link(job.device, job.replicas * job.tensor)
    activation = job.tokens * job.element_bytes * job.architecture.model.hidden_size / job.split
    return costs, over.latency + activation / over.bandwidth


def makespan(job: Job, plan: Callable[[int], Plan], costs: Mapping[str, list[float]], transfer: float) -> float:
    """Of all micro-batches of the job in the order of `plan`, which is given their number.

    A long one is a short one and the rest of its steady state, which repeats every p.
    """
    short = 6 * job.pipeline
    if job.micro_batches <= short + job.pipeline:
        return simulate(plan(job.micro_batches), costs, transfer).makespan
    whole, more = divmod(job.micro_batches - short, job.pipeline)
    first = simulate(plan(short), costs, transfer).makespan
    second = simulate(plan(short + job.pipeline), costs, transfer).makespan
    return first + (second - first) * (whole + more / job.pipeline)
