"""A step graph without a GPU: what the host asks torch for is written down with its tensors, and done again.

Like a CUDA graph, the tape knows addresses and numbers, not the code that chose them: a replay repeats each operation
on the same memory with the same numbers. Recording refuses what a CUDA graph cannot hold: a value fetched by the host,
a shape that only the device knows, a copy between host and device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.recording import INDEXING, UNKNOWN_ON_THE_HOST, tensors

_NO_VALUES = ("detach", "alias", "empty", "new_empty", "empty_like", "empty_strided")


class CannotBeRecorded(Exception):
    """A graph could not hold this operation."""


def storages(value: Any) -> set[int]:
    """The storages of all tensors in a value."""
    return {tensor.untyped_storage()._cdata for tensor in tensors(value)}


class Tape(TorchDispatchMode):
    """The operations of one recorded step. `foreign` are the storages that it read and did not make, by an operation
    that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.foreign: dict[int, str] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0].removeprefix("aten::")
        unknown = bool(UNKNOWN_ON_THE_HOST.intersection(func.tags))
        if name in INDEXING:  # of a shape that is known, unless by a mask
            unknown = any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1]))
        if unknown:
            raise CannotBeRecorded(name)
        if name == "lift_fresh":  # a number of the program
            self._made |= storages(args)
        for storage in storages((args, kwargs)) - self._made:
            self.foreign.setdefault(storage, name)
        result = func(*args, **kwargs)
        if len({tensor.device for tensor in tensors((args, kwargs, result)) if tensor.dim()}) > 1:
            raise CannotBeRecorded(f"{name} between devices")
        self._made |= storages(result) - storages((args, kwargs))
        self.operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Everything again, into the memory where the results were."""
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                given = storages((args, kwargs))
                if func.name().split(".")[0].removeprefix("aten::") in _NO_VALUES:
                    continue
                again = func(*args, **kwargs)
                for started in again if func.namespace == "c10d" else ():  # a recorded wait has no operation
                    if isinstance(started, torch.ScriptObject):
                        torch._C._distributed_c10d.Work.unbox(started).wait()
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old.untyped_storage()._cdata not in given:  # neither a view nor changed in place
                        old.copy_(new)


class TapeRecorder:
    """A `megalite.cuda_graph.GraphRecorder` that counts the steps that it ran, recorded and replayed."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.warmed = self.replays = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        self.warmed += 1
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape = Tape()
        with tape:
            outputs = run()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return outputs, replay
