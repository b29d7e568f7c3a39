"""Work that is recorded once as a CUDA graph and replayed: one call of the host instead of a launch for every kernel.

What is replayed are kernels with the addresses and the numbers that they were given when they were recorded, so work
may only be recorded if it

- reads tensors that outlive it;
- never waits for the device, and copies nothing between host and device;
- starts the same communications in the same order every time, and waits for each that it starts;
- depends on no number that changes from time to time but through a tensor.

In the tests a tape stands in for the graph on CPUs (`tests/support/tape.py`). Source: NVIDIA, CUDA C++ programming
guide, "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from megalite.errors import UserError

Outputs = TypeVar("Outputs")


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


def recorder_for(device: torch.device, switch: str) -> GraphRecorder:
    """The recorder of a GPU; elsewhere a UserError that names the switch, "train.cuda_graph = true"."""
    if device.type != "cuda":
        raise UserError(f"{switch} needs a GPU, and this run's device is {device.type}; leave it off")
    return CudaRecorder(device)
