"""Process groups that send nothing and write everything down, and a watch for what would make the host wait.

One rank of any mesh runs alone, at once, and without values: on the meta device whole training steps of large models
take milliseconds. What comes out is the order in which that rank starts its communications and waits for them, on
which it may be judged without a GPU.

    recorder = Recorder(torch.device("meta"))
    mesh = Mesh(tp=2, rank=1, device=recorder.device, make_group=recorder)
    ...                      # build, run a step with `observe=recorder.observe`
    recorder.events          # Start, Wait and HostWait in the order in which they happened

On CUDA a `wait()` stops the stream of the computation and not the host; the host is stopped by a copy to it, or by an
operation whose result has a shape or is a number that only the device knows: `watching_the_host` notes these.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.mesh import DONE, Group, GroupFactory, Work
from megalite.schedule.ops import Op

META = torch.device("meta")


@dataclass(frozen=True, eq=False)
class Start:
    """A communication has been started, while the engine was busy with `during` (None outside it)."""

    name: str
    ranks: tuple[int, ...]
    """All that take part; of a transfer the two ends."""
    elements: int
    dtype: torch.dtype
    during: Op | None
    group: tuple[int, ...]
    """The ranks of the group that it was asked of."""
    parts: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Of an all-to-all: rows that come from each member, and that leave for each."""

    def __repr__(self) -> str:
        return f"{self.name}[{self.elements} {str(self.dtype)[6:]}] {self.ranks} in {self.during}"


@dataclass(frozen=True, eq=False)
class Wait:
    """The computation waits for `start`."""

    start: Start
    during: Op | None


@dataclass(frozen=True)
class HostWait:
    """The host would wait for the device: in `operation`, called by `function` of the project."""

    operation: str
    function: str


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product has been given to the device."""

    shape: tuple[int, ...]
    during: Op | None


@dataclass
class Recorder:
    """Makes recording groups; pass it as `Mesh(make_group=...)`, and `observe` to what runs the engine.

    `sent` is called with every tensor that is handed to a send, `after` when an operation of the engine has ended. With
    `beneath`, groups that it makes do the communicating, so that there are values.
    """

    device: torch.device = META
    events: list[Start | Wait | HostWait | Product] = field(default_factory=list)
    sent: Callable[[Tensor, Op], None] = lambda tensor, op: None
    after: Callable[[Op], None] = lambda op: None
    during: Op | None = None
    beneath: GroupFactory | None = None

    def __call__(self, ranks: tuple[int, ...], rank: int) -> Group:
        return RecordingGroup(ranks, rank, self)

    @contextlib.contextmanager
    def observe(self, op: Op) -> Iterator[None]:
        self.during = op
        yield
        self.during = None
        self.after(op)

    def note_host_wait(self, operation: str) -> None:
        self.events.append(HostWait(operation, _project_function()))

    def starts(self, name: str) -> list[Start]:
        return [event for event in self.events if isinstance(event, Start) and event.name == name]

    def waits(self) -> dict[Start, Wait]:
        return {event.start: event for event in self.events if isinstance(event, Wait)}

    def host_waits(self) -> list[HostWait]:
        return [event for event in self.events if isinstance(event, HostWait)]

    def unwaited(self) -> list[Start]:
        waits = self.waits()
        return [event for event in self.events if isinstance(event, Start) and event not in waits]


@dataclass
class _Recorded:
    recorder: Recorder
    start: Start
    work: Work
    done: bool = False

    def wait(self) -> None:
        if not self.done:
            self.recorder.events.append(Wait(self.start, self.recorder.during))
            self.work.wait()
        self.done = True


class RecordingGroup(Group):
    """A `Group` that holds its callers to NCCL's rules: dense tensors on the device, alike, of fitting sizes."""

    def __init__(self, ranks: tuple[int, ...], rank: int, recorder: Recorder) -> None:
        super().__init__(ranks, rank, None)
        self.recorder = recorder
        self.beneath = recorder.beneath and recorder.beneath(ranks, rank)

    def _record(self, name: str, *tensors: Tensor, other: int | None = None, options: tuple[Any, ...] = ()) -> Work:
        """`options` are the arguments of the operation after its tensors."""
        where = f"{name} among {self.ranks} in {self.recorder.during}"
        for tensor in tensors:
            assert tensor.device == self.recorder.device, f"{where}: a tensor on {tensor.device}"
            assert tensor.is_contiguous(), f"{where}: {tuple(tensor.shape)} has strides {tensor.stride()}"
            assert tensor.numel() > 0 or name == "all_to_all", f"{where}: an empty tensor"
        assert len({tensor.dtype for tensor in tensors}) == 1, f"{where}: {[tensor.dtype for tensor in tensors]}"
        ends = self.ranks if other is None else tuple(sorted((self.ranks[self.index], self.ranks[other])))
        assert len(set(ends)) == len(ends), f"{where}: a rank talks to itself"
        recorder, first = self.recorder, tensors[0]
        parts = tuple(map(tuple, options)) if name == "all_to_all" else ((), ())
        start = Start(name, ends, first.numel(), first.dtype, recorder.during, self.ranks, parts)
        recorder.events.append(start)
        work = DONE if self.beneath is None else getattr(self.beneath, name)(*tensors, *options)
        return _Recorded(recorder, start, work)

    def _fits(self, whole: Tensor, part: Tensor) -> None:
        assert whole.numel() == part.numel() * self.size, f"{whole.shape} is not {self.size} x {part.shape}"

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        return DONE if self.size == 1 else self._record("all_reduce", tensor, options=(op,))

    def all_gather(self, output: Tensor, tensor: Tensor) -> Work:
        self._fits(output, tensor)
        return super().all_gather(output, tensor) if self.size == 1 else self._record("all_gather", output, tensor)

    def reduce_scatter(self, output: Tensor, tensor: Tensor) -> Work:
        self._fits(tensor, output)
        if self.size == 1:
            return super().reduce_scatter(output, tensor)
        return self._record("reduce_scatter", output, tensor)

    def all_to_all(self, output: Tensor, tensor: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> Work:
        assert (sum(arriving), sum(leaving)) == (len(output), len(tensor)), "parts of an all-to-all do not fit"
        return self._record("all_to_all", output, tensor, options=(arriving, leaving))

    def broadcast(self, tensor: Tensor, source: int) -> Work:
        return DONE if self.size == 1 else self._record("broadcast", tensor, options=(source,))

    def pass_on(self, output: Tensor, tensor: Tensor) -> Work:
        return self._record("pass_on", output, tensor)  # one launch on NCCL

    def send(self, tensor: Tensor, to: int) -> Work:
        if self.recorder.during is not None:
            self.recorder.sent(tensor, self.recorder.during)
        return self._record("send", tensor, other=to, options=(to,))

    def receive(self, tensor: Tensor, source: int) -> Work:
        return self._record("receive", tensor, other=source, options=(source,))


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}


class NotingProducts(TorchDispatchMode):
    """Within, matrix products are noted among the recorder's events."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.rstrip("_") in _PRODUCTS:
            self.recorder.events.append(Product(tuple(result.shape), self.recorder.during))
        return result


UNKNOWN_ON_THE_HOST = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


_UPLOADS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


@contextlib.contextmanager
def watching_the_host(recorder: Recorder) -> Iterator[None]:
    """Within, everything that would stop the host on a GPU is noted in `recorder`; what is fetched is 1 everywhere.

    Sources: torch's own tags of operations; an index is a hidden `nonzero` where it is a mask; a copy between host and
    device stops the host in both directions unless it is asked not to, that of a Python number into a tensor included.
    """
    with _Uploads(recorder), _Fetches(recorder):
        yield


class _Uploads(TorchFunctionMode):
    """Values of the host that become tensors on the device."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UPLOADS and not isinstance(args[0], Tensor) and result.device == self.recorder.device:
            self.recorder.note_host_wait(func.__name__)
        return result


class _Fetches(TorchDispatchMode):
    """Values of the device that the host must see, and tensors that are copied between the two."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, recorder = kwargs or {}, self.recorder
        operation = func.name().split(".")[0].removeprefix("aten::")
        if operation in INDEXING:
            if any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1])):
                recorder.note_host_wait(operation)
        elif operation in ("_to_copy", "copy_"):
            target = kwargs.get("device") or args[0].device
            source = args[1] if operation == "copy_" else args[0]
            crosses = (target == recorder.device) != (source.device == recorder.device)
            if crosses and not kwargs.get("non_blocking"):
                recorder.note_host_wait(operation)
            if crosses and target != recorder.device:
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        elif UNKNOWN_ON_THE_HOST.intersection(func.tags) and any(
            tensor.device == recorder.device for tensor in tensors((args, kwargs))
        ):
            recorder.note_host_wait(operation)
            if operation == "_local_scalar_dense":
                return 1
        return func(*args, **kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))


def _project_function() -> str:
    """The innermost function of megalite or its kernels on the stack: `Trainer._agree`."""
    frame = sys._getframe(1)
    root = Path(__file__).parents[2]
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root / "megalite") or path.is_relative_to(root / "kernels"):
            return frame.f_code.co_qualname
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
