"""Tensor-parallel communication of one layer: how much of it the layer's products hide.

A layer is played through as `megalite.parallel.linear` runs it, on two queues: what the device computes, in order, and
what the tensor ranks send, in order. The host starts a collective without waiting; where its result is needed, the
computation stands still until it has come. Beside each other, both are slower (`Queues`).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from megalite.model.cost import Matrix
from megalite.planning.hardware import Link, gather_seconds, link, product_rate
from megalite.planning.job import Job

SMALL = 160.0
"""A GEMM reaches half its peak rate when a dimension is this small: partial tiles, pipelines not filled."""

HIDDEN_SHARE = 0.8
"""Fraction of compute time in which overlapped communication makes progress: the two compete for the device."""


def exposed(communication: float, beside: float) -> float:
    return max(0.0, communication - HIDDEN_SHARE * beside)


def product_seconds(job: Job, rows: float, inner: float, outer: float) -> float:
    """Seconds of one product [rows, inner] x [inner, outer]."""
    rate = product_rate(job.device, job.element_bytes)
    if job.device.is_gpu:
        for size in (rows, inner, outer):
            rate *= size / (size + SMALL)
    return 2.0 * rows * inner * outer / rate


def matrix_seconds(job: Job, matrix: Matrix, rows: float) -> float:
    """Seconds of one product of a layer with `rows` tokens; that of experts takes tiles of one expert's rows."""
    if matrix.count * matrix.used == 1:
        return product_seconds(job, rows, matrix.inputs, matrix.outputs)
    return matrix.count * product_seconds(job, rows * matrix.used / matrix.count, matrix.inputs, matrix.outputs)


def splits_of(job: Job, matrix: Matrix) -> int:
    """In how many pieces the product of a matrix runs in forward and of its input gradient; experts' are whole."""
    in_pieces = job.split > 1 and matrix.split and matrix.count * matrix.used == 1
    return job.overlap_splits if in_pieces else 1


def pieced_seconds(job: Job, matrix: Matrix) -> float:
    """`matrix_seconds` of all tokens, in as many products as `splits_of` says."""
    splits = splits_of(job, matrix)
    return splits * matrix_seconds(job, matrix, job.tokens / splits)


def tensor_link(job: Job) -> Link:
    return link(job.device, job.tensor, 1)


def stream_exchange(job: Job, width: int = 0, splits: int = 1) -> float:
    """Seconds of one all-gather or reduce-scatter over the tensor ranks, by default of hidden size, of one piece of an
    activation."""
    size = job.tokens * (width or job.architecture.model.hidden_size) * job.element_bytes
    return gather_seconds(size / splits, job.tensor, tensor_link(job))


def rows_seconds(job: Job) -> float:
    """Seconds in which a sparse layer's rows travel to the ranks of their experts, or back; 0 if they are here."""
    layer = job.layer
    if not layer.copies or job.expert == 1:
        return 0.0
    size = job.tokens * layer.copies * layer.hidden * job.element_bytes
    return gather_seconds(size, job.expert, link(job.device, job.expert, job.tensor * job.context))


class Queues:
    """A clock of a device that computes and communicates.

    Alone, each takes its own time. Beside each other, communication runs at `sends` and computation at `computes` of
    its speed. These follow from two measured numbers: a collective that ends under a product makes both take `cost` of
    its time longer, and one that outlasts the product has made progress in `HIDDEN_SHARE` of it.
    """

    def __init__(self, cost: float) -> None:
        self.sends = HIDDEN_SHARE / (1 - cost * (1 - HIDDEN_SHARE))
        self.computes = 1 - cost * self.sends
        self.now = self.computed = 0.0
        self._sending: deque[list[float]] = deque()
        self._started = self._ended = 0

    def start(self, seconds: float) -> int:
        """Enqueue a collective; its number."""
        self._sending.append([seconds])
        self._started += 1
        return self._started

    def wait(self, number: int) -> None:
        while self._ended < number:
            self.now += self._sending[0][0]
            self._end()

    def compute(self, seconds: float) -> None:
        self.computed += seconds
        while self._sending and seconds > 0.0:
            first = self._sending[0]
            wall = min(seconds / self.computes, first[0] / self.sends)
            ends = wall * self.sends >= first[0]
            self.now += wall
            seconds -= wall * self.computes
            first[0] -= wall * self.sends
            if ends:
                self._end()
        self.now += max(0.0, seconds)

    def _end(self) -> None:
        self._sending.popleft()
        self._ended += 1

    @property
    def exposed(self) -> float:
        """Seconds beyond those of the computation."""
        return self.now - self.computed


def head_exchange(job: Job, product: float) -> float:
    """Exposed seconds of the gather before the output layer's `product`, or of the sum of its input's gradient: all but
    one piece are under it."""
    queues, splits = Queues(job.practice.hiding_cost), job.overlap_splits if job.split > 1 else 1
    for number in [queues.start(stream_exchange(job, splits=splits)) for _ in range(splits)]:
        queues.wait(number)
        queues.compute(product / splits)
    return queues.exposed


class Exchanged(NamedTuple):
    """A matrix whose activations are sent, if it is split: its pieces, the seconds of one piece of its product and of
    the whole, and of sending one piece, which without sequence parallelism is an all-reduce: two."""

    rows: bool
    split: bool
    splits: int
    piece: float
    whole: float
    sent: float

    @staticmethod
    def of(job: Job, matrix: Matrix) -> Exchanged:
        splits, width = splits_of(job, matrix), matrix.outputs if matrix.rows else matrix.inputs
        whole = matrix_seconds(job, matrix, job.tokens)
        piece = whole if splits == 1 else matrix_seconds(job, matrix, job.tokens / splits)
        sent = (1 if job.split > 1 else 2) * stream_exchange(job, width, splits)
        return Exchanged(matrix.rows, matrix.split, splits, piece, whole, sent)

    def start(self, queues: Queues) -> list[int]:
        """Start the collectives of all pieces."""
        return [queues.start(self.sent) for _ in range(self.splits)]


class LayerCommunication:
    """A layer's matrices and collectives, played through in forward and backward.

    `attention_backward` are the seconds of attention in backward.
    """

    def __init__(self, job: Job, attention_backward: float) -> None:
        self.job, self.attention_backward = job, attention_backward
        self.matrices = [Exchanged.of(job, matrix) for matrix in job.layer.sizes.matrices if matrix.split]
        self.attention_out = next((matrix for matrix in self.matrices if matrix.rows), None)
        self.cuts, self.hides = job.split > 1, job.practice.overlaps_tensor
        self.gathers = self.cuts and not job.splits_backward and not job.keep_gathered  # inputs, again in backward
        self.deferred: list[tuple[int, float]] = []

    def _gathered_product(self, queues: Queues, matrix: Exchanged) -> None:
        """A gather, piece by piece under the product of what it brings, and under all that was put off."""
        arriving = matrix.start(queues) if self.cuts else [0] * matrix.splits
        self._run_deferred(queues)
        for number in arriving:
            if self.hides != "all":
                queues.wait(number)
            queues.compute(matrix.piece)
        queues.wait(arriving[-1])

    def _product_summed(self, queues: Queues, matrix: Exchanged) -> int:
        """A product, the sum of each piece started after it; the number of the last one."""
        last = 0
        for _ in range(matrix.splits):
            queues.compute(matrix.piece)
            last = queues.start(matrix.sent)
        return last

    def forward(self) -> float:
        """Exposed seconds."""
        queues = Queues(self.job.practice.hiding_cost)
        for matrix in self.matrices:
            if not matrix.rows:
                self._gathered_product(queues, matrix)
            elif self.hides == "all":  # as if under the product itself
                last = matrix.start(queues)[-1]
                queues.compute(matrix.whole)
                queues.wait(last)
            else:
                queues.wait(self._product_summed(queues, matrix))
        return queues.exposed

    def backward(self) -> float:
        """Exposed seconds of the gradients of inputs and weights; where the latter are put off, of the former."""
        queues, before = Queues(self.job.practice.hiding_cost), 0.0
        for _ in range(2 if self.job.overlap_splits > 1 else 1):  # the second has something put off by the first
            before = queues.exposed
            self._backward(queues)
        return queues.exposed - before

    def _backward(self, queues: Queues) -> None:
        ahead = 0
        for matrix in reversed(self.matrices):
            if not matrix.rows:
                self._column_backward(queues, matrix, ahead)
                ahead = 0
                continue
            self._gathered_product(queues, matrix)
            self._weight_gradient(queues, matrix, 0)
            if matrix is self.attention_out:
                ahead = self._gathered_ahead(queues)

    def _gathered_ahead(self, queues: Queues) -> int:
        """The gather of the input of queries, keys and values under the backward pass of attention."""
        first = self.matrices[0]
        if not self.gathers or self.job.layer.latent is not None or first.splits == 1:
            return 0
        ahead = first.start(queues)[-1]
        queues.compute(self.attention_backward)
        return ahead

    def _column_backward(self, queues: Queues, matrix: Exchanged, ahead: int) -> None:
        if self.gathers and not ahead:
            ahead = matrix.start(queues)[-1]
        if self.hides == "none":
            queues.wait(ahead)
        summed = self._product_summed(queues, matrix)
        if self.hides == "none" or self.job.splits_backward:
            queues.wait(summed)
        self._run_deferred(queues)
        self._weight_gradient(queues, matrix, ahead)
        queues.wait(summed)

    def _weight_gradient(self, queues: Queues, matrix: Exchanged, needs: int) -> None:
        """Now, or under the next collective; not at all where the schedule puts it off."""
        if self.job.splits_backward:
            return
        self.deferred.append((needs, matrix.whole))
        if matrix.splits == 1:
            self._run_deferred(queues)

    def _run_deferred(self, queues: Queues) -> None:
        for needs, product in self.deferred:
            queues.wait(needs)
            queues.compute(product)
        self.deferred.clear()


def tensor_talk(job: Job, attention_backward: float) -> tuple[float, float, float]:
    """Exposed seconds of tensor-parallel communication in a layer: forward, input gradient, weight gradient.

    `attention_backward` are the seconds of attention in backward. Of weight gradients that the schedule puts off, each
    gathers on its own, with nothing beside; of others, what is exposed counts with the input gradients.
    """
    if job.tensor == 1:
        return 0.0, 0.0, 0.0
    layer = LayerCommunication(job, attention_backward)
    apart = job.split > 1 and job.splits_backward
    again = [matrix for matrix in layer.matrices if matrix.rows or not job.keep_gathered]
    gathers = sum(matrix.splits * matrix.sent for matrix in again) if apart else 0.0
    return layer.forward(), layer.backward(), gathers
