"""Two forward passes in turns (`megalite.parallel.turns`): what of their communication nothing hides.

A layer is played through as the trainer runs it, on the two queues of `megalite.planning.tensor_time`. Beside what one
pass sends lie the products and the attention of the other, whole instead of in pieces; element-wise work is not counted
as something to hide under.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalite.planning.job import Job
from megalite.planning.tensor_time import Exchanged, Queues, rows_seconds


def two_batch_talk(job: Job, attention: float) -> tuple[float, float]:
    """Exposed seconds of one layer's forward pass: those of the tensor ranks, and of rows on their way to experts.

    `attention` are the seconds of attention. Both kinds share the links, and the exposed time by what they send.
    """
    if job.tensor == job.expert == 1:
        return 0.0, 0.0
    layer = _Layer(job, attention)
    exposed = (layer.play(4) - layer.play(2)) / 4  # of one layer of one pass, in the midst of others
    rows = layer.sent_to_experts / (layer.sent_to_experts + layer.sent_to_tensor_ranks or 1.0)
    return (1 - rows) * exposed, rows * exposed


class _Layer:
    def __init__(self, job: Job, attention: float) -> None:
        self.job, self.attention, self.rows = job, attention, rows_seconds(job)
        of_experts = [matrix.count * matrix.used > 1 for matrix in job.layer.sizes.matrices]
        matrices = [Exchanged.of(job, matrix) for matrix in job.layer.sizes.matrices]
        first = of_experts.index(True) if any(of_experts) else len(matrices)
        self.before, after = matrices[:first], list(zip(matrices[first:], of_experts[first:]))
        self.experts = [matrix for matrix, of_expert in after if of_expert]
        self.shared = [matrix for matrix, of_expert in after if not of_expert]
        self.attention_out = next((matrix for matrix in matrices if matrix.rows), None)
        self.sent_to_experts = 2 * self.rows
        self.sent_to_tensor_ranks = sum(matrix.splits * matrix.sent for matrix in matrices if self._exchanges(matrix))

    def _exchanges(self, matrix: Exchanged) -> bool:
        """Whether tensor ranks send each other what goes into it, or sum what comes out."""
        return self.job.tensor > 1 and matrix.split and (matrix.rows or self.job.split > 1)

    def play(self, layers: int) -> float:
        """Exposed seconds of two passes through so many layers."""
        queues = Queues(self.job.practice.hiding_cost)
        passes = [self._pass(queues, layers) for _ in range(2)]
        next(passes[0], None)  # the first one leads
        while passes:
            passes = [one for one in passes if next(one, "ended") != "ended"]
        return queues.exposed

    def _pass(self, queues: Queues, layers: int) -> Iterator[None]:
        """One pass, from turn to turn."""
        for _ in range(layers):
            yield from self._products(queues, self.before)
            if self.experts:
                yield from self._sparse(queues)

    def _products(self, queues: Queues, matrices: Sequence[Exchanged]) -> Iterator[None]:
        for matrix in matrices:
            if matrix is self.attention_out:
                queues.compute(self.attention)
            if not self._exchanges(matrix):
                queues.compute(matrix.whole)
                continue
            if matrix.rows:
                yield
                queues.compute(matrix.whole)
            sent = matrix.start(queues)[-1]
            yield
            queues.wait(sent)
            if not matrix.rows:
                queues.compute(matrix.whole)

    def _sparse(self, queues: Queues) -> Iterator[None]:
        """Rows to the experts beside the shared ones, their products, and rows back; tensor ranks wait in between."""
        there = queues.start(self.rows)
        yield from self._products(queues, self.shared)
        if self.rows:
            yield
        queues.wait(there)
        for matrix in self.experts:
            if self._exchanges(matrix) and not matrix.rows:
                queues.wait(matrix.start(queues)[-1])
            queues.compute(matrix.whole)
            if self._exchanges(matrix) and matrix.rows:
                queues.wait(matrix.start(queues)[-1])
        back = queues.start(self.rows)
        if self.rows:
            yield
        queues.wait(back)
