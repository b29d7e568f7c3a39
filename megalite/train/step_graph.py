"""Forward and backward passes of a training step, recorded once as a graph and replayed (`train.cuda_graph`).

A replay costs the host one call instead of some forty launches a layer. What is replayed are kernels with the addresses
and the numbers that they were given when they were recorded, so a step may only be recorded if it

- reads tensors that outlive it: weights, gradients, tables, and copies of the batch that are filled before each replay;
- never waits for the device, and copies nothing between host and device;
- starts the same communications in the same order every time, and waits for each that it starts;
- depends on no number that changes from step to step but through a tensor.

`tests/train/test_step_graph.py` holds the trainer to these rules on a CPU and on the meta device. Agreement among the
ranks and the update are not recorded: they come after. Source: NVIDIA, CUDA C++ programming guide, "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.errors import UserError

Outputs = TypeVar("Outputs")
Batches = Sequence[Batch | None]

WARM_UP = 3
"""Steps of one kind that run as usual before one is recorded: kernels are compiled and chosen in the first, and buckets
know from the second on when they are complete."""


class GraphRecorder(Protocol):
    """How a step is recorded; both methods are called with the same function on the same tensors."""

    def warm_up(self, run: Callable[[], Outputs]) -> Outputs:
        """What `run` returns, computed now where it will be recorded."""
        ...

    def record(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """(what `run` returned, whose tensors have values once it is replayed; what replays it)."""
        ...


class CudaRecorder:
    """Records on a stream of its own, with memory of its own, as torch.cuda.graph wants it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def _ordered(self) -> Iterator[None]:
        """The stream begins after all work so far, and all later work after the stream's."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        yield
        current.wait_stream(self._stream)

    def warm_up(self, run: Callable[[], Outputs]) -> Outputs:
        with self._ordered(), torch.cuda.stream(self._stream):
            return run()

    def record(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads write checkpoints, pin batches and watch communications meanwhile: their calls are their own.
        with self._ordered(), torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = run()
        return outputs, graph.replay


def recorder_for(device: torch.device) -> GraphRecorder:
    """The recorder of a GPU; UserError elsewhere."""
    if device.type != "cuda":
        raise UserError(f"train.cuda_graph = true needs a GPU, and this run's device is {device.type}; use false")
    return CudaRecorder(device)


class StepGraph:
    """Runs `accumulate(batches, shape)`, which must follow the rules above, and from the fourth step of a kind on
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
