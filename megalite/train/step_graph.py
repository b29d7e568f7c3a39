"""Forward and backward passes of a training step, recorded once as a graph and replayed (`train.cuda_graph`).

A replay costs the host one call instead of some forty launches a layer. A recorded step keeps to the rules of
`megalite.cuda_graph`; what outlives it are weights, gradients, tables, and copies of the batch that are filled before
each replay. `tests/train/test_step_graph.py` holds the trainer to these rules on a CPU and on the meta device.
Agreement among the ranks and the update are not recorded: they come after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megalite.cuda_graph import GraphRecorder
from megalite.data.batch import Batch

Batches = Sequence[Batch | None]

WARM_UP = 3
"""Steps of one kind that run as usual before one is recorded: kernels are compiled and chosen in the first, and buckets
know from the second on when they are complete."""


class StepGraph:
    """Runs `accumulate(batches, shape)`, which must follow those rules, and from the fourth step of a kind on
    replays it.

    `settle` makes that nothing of an earlier step is on its way any more. `held` are the tensors whose addresses a
    recorded step keeps; where one of them has moved, or batches are of another kind, recording begins again.
    """

    def __init__(
        self,
        accumulate: Callable[[Batches, tuple[int, int] | None], Any],
        settle: Callable[[], None],
        held: Callable[[], Sequence[Tensor]],
        recorder: GraphRecorder,
    ) -> None:
        self._accumulate, self._settle, self._held, self._recorder = accumulate, settle, held, recorder
        self._kind: Any = None
        self._seen = 0
        self._inputs: list[Batch | None] = []
        self._outputs: Any = None
        self._replay: Callable[[], None] | None = None

    @property
    def recorded(self) -> bool:
        """Whether the next step of the same kind is a replay."""
        return self._replay is not None

    def __call__(self, batches: Batches, shape: tuple[int, int] | None) -> Any:
        kind = (shape, *map(_kind_of, batches), *(tensor.data_ptr() for tensor in self._held()))
        if kind != self._kind:
            self._kind, self._seen, self._inputs, self._outputs, self._replay = kind, 0, [], None, None
        self._seen += 1
        self._settle()
        if self._seen <= WARM_UP:
            return self._recorder.warm_up(lambda: self._accumulate(batches, shape))
        if self._replay is None:
            self._inputs = [None if batch is None else _copied(batch) for batch in batches]
            self._outputs, self._replay = self._recorder.record(lambda: self._accumulate(self._inputs, shape))
        for kept, batch in zip(self._inputs, batches, strict=True):
            if kept is not None and batch is not None:
                for into, tensor in zip(_tensors(kept), _tensors(batch), strict=True):
                    into.copy_(tensor)
        self._replay()
        return self._outputs


def _tensors(batch: Batch) -> list[Tensor]:
    parts = (batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS, *batch.columns.values())
    return [part for part in parts if part is not None]


def _copied(batch: Batch) -> Batch:
    positions_BS, documents_BS = (
        None if part is None else part.clone() for part in (batch.positions_BS, batch.documents_BS)
    )
    columns = {name: column.clone() for name, column in batch.columns.items()}
    return Batch(batch.tokens_BS.clone(), batch.labels_BS.clone(), positions_BS, documents_BS, columns)


def _kind_of(batch: Batch | None) -> Any:
    """What two batches must have in common to go through the same graph."""
    if batch is None:
        return None
    places = (batch.positions_BS is None, batch.documents_BS is None, *batch.columns)
    return places, tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(batch))
