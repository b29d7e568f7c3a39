"""Runs the Gluon kernels of attention without a GPU: Triton has no interpreter for Gluon.

The kernels' own functions are executed as Python with torch tensors for tiles, one thread for each partition of warps
and one for the copies of the tensor memory accelerator. What is asynchronous on the device is so here, at the worst
time: a copy's target is NaN until it lands, after a random delay, and not in the order of the orders; a product of
`warpgroup_mma` takes its operands when it is issued and again when it is waited for, and has to find the same. Barriers
count arrivals and bytes as the hardware does, and one that nobody reaches ends in an error. What a partition has stored
may be copied away only after its fence, by whichever partition. Layouts of tiles over threads are not emulated: the
compiler checks those.
"""

import queue
import random
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import torch

LATENCY = 5e-4  # seconds at most that a copy takes
REST = 5e-4  # seconds that a partition waits where it has let others go on
OVERTAKING = 5  # copies that land before the one ordered first: all that a consumer needs to begin, but for that one
WAIT = 20.0  # seconds after which a barrier counts as never reached


class Barrier:
    """A phase is complete when all arrivals and all bytes that it expects are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.left = self.bytes = self.phase = 0

    def index(self, _: int) -> "Barrier":
        return self

    def update(self, arrivals: int, added: int) -> None:
        with self.changed:
            self.left -= arrivals
            self.bytes += added
            assert self.count and self.left >= 0, "more arrivals than the barrier expects"
            if self.left == 0 and self.bytes == 0:
                self.phase += 1
                self.left = self.count
                self.changed.notify_all()


class Barriers(list[Barrier]):
    index: Any = list.__getitem__


class Shared:
    """A tile in shared memory, or an array of them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype

    def index(self, position: int) -> "Shared":
        return Shared(self.tensor[position])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.tensor.permute(order))

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.tensor[start : start + length])

    def load(self, layout: Any) -> torch.Tensor:
        return self.tensor.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype or self.dtype == torch.int32  # Python's numbers make int64 of it
        self.tensor.copy_(value)
        UNFENCED.add((threading.get_ident(), self.tensor.data_ptr()))


class Descriptor:
    def __init__(self, given: Any) -> None:
        self.matrix = given.base.detach().as_strided(given.shape, given.strides)
        self.block, self.dtype, self.layout = given.block_shape, given.base.dtype, given.layout
        nbytes = self.block[0] * self.block[1] * self.dtype.itemsize
        self.block_type = types.SimpleNamespace(nbytes=nbytes)

    def part(self, coordinates: list[int]) -> torch.Tensor:
        """The rows and columns of a tile that exist."""
        (row, column), (rows, columns) = (int(x) for x in coordinates), self.block
        assert row >= 0 and column >= 0 and row + rows < 2**31
        return self.matrix[row : row + rows, column : column + columns]


class Pointer:
    def __init__(self, flat: torch.Tensor, at: Any = 0) -> None:
        self.flat, self.at = flat, at

    def __add__(self, step: Any) -> "Pointer":
        return Pointer(self.flat, self.at + step)


class Product:
    """An accumulator that is being computed."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self.compute, self.early, self.done = compute, compute(), False

    def finish(self) -> torch.Tensor:
        if not self.done:
            late = self.compute()
            same = (self.early == late) | (self.early.isnan() & late.isnan())  # rows that nobody stores may overflow
            assert same.all(), "an operand changed, or was not there yet, while it was read"
            self.done = True
        return self.early


MINE = threading.local()  # of a partition: the products under way
UNFENCED: set[tuple[int, int]] = set()  # threads, and tiles in which they stored since their last fence


def _running() -> list[Product]:
    if not hasattr(MINE, "running"):
        MINE.running = []
    return MINE.running


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    def value(x: Any) -> torch.Tensor:
        return (x.tensor if isinstance(x, Shared) else x).float()

    assert not isinstance(acc, Product) and is_async and b.tensor.dtype.itemsize == 2
    before = acc.clone() if use_acc else torch.zeros_like(acc)
    product = Product(lambda: before + value(a) @ value(b))
    _running().append(product)
    return product


def warpgroup_mma_wait(left: int, deps: list[Product]) -> Any:
    running = _running()
    while len(running) > left:
        running.pop(0).finish()
    assert all(product.done for product in deps), "a result is used that was not waited for"
    results = [product.early for product in deps]
    return results[0] if len(results) == 1 else tuple(results)


class Machine:
    """One program's shared memory, copies and partitions."""

    def __init__(self, place: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        self.place, self.grid = place, grid
        self.copies: queue.Queue[Any] = queue.Queue()
        self.errors: list[BaseException] = []  # of all threads

    def language(self) -> Any:
        """What the kernels call `gl`."""

        def scalar(x: int) -> torch.Tensor:
            return torch.tensor(x, dtype=torch.int64)

        def pairwise(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            return lambda a, b: function(*(torch.as_tensor(x) for x in (a, b)))

        def load(pointer: Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
            found = torch.full(mask.shape, other, dtype=pointer.flat.dtype)
            found[mask] = pointer.flat[pointer.at[mask]]
            return found

        def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
            pointer.flat[pointer.at[mask]] = value[mask].to(pointer.flat.dtype)

        def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
            if layout != "barrier":
                unknown = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
                return Shared(torch.full(shape, unknown, dtype=dtype))
            return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))

        return types.SimpleNamespace(
            int32=torch.int32, int64=torch.int64, float32=torch.float32, constexpr=None, load=load, store=store,
            program_id=lambda axis: scalar(self.place[axis]), num_programs=lambda axis: scalar(self.grid[axis]),
            num_warps=lambda: 4, minimum=pairwise(torch.minimum), maximum=pairwise(torch.maximum),
            where=lambda mask, a, b: torch.where(mask, a, b), exp2=torch.exp2, log2=torch.log2,
            max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            arange=lambda start, stop, layout: torch.arange(start, stop), static_range=range,
            convert_layout=lambda x, layout: x, allocate_shared_memory=allocate, warp_specialize=self.specialise,
            **dict.fromkeys(("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"),
                            lambda *_: None),
        )  # fmt: skip

    def specialise(self, parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1

        def run(function: Callable[..., None], given: tuple[Any, ...]) -> None:
            try:
                function(*given)
                assert not _running(), "a product was never waited for"
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT * 2)

    def copy_engine(self) -> None:
        waiting: list[Any] = []
        landed = 0
        while True:
            while not waiting or not self.copies.empty():
                if (order := self.copies.get()) is None:
                    return
                waiting.append(order)
            time.sleep(LATENCY * random.uniform(0.5, 1.0))
            source, coordinates, barrier, target = waiting.pop(1 if landed < OVERTAKING and len(waiting) > 1 else 0)
            landed = max(landed + 1, OVERTAKING if not waiting else 0)
            part = source.part(coordinates)
            target.tensor.zero_()
            target.tensor[: part.shape[0], : part.shape[1]] = part
            try:
                barrier.update(0, -source.block_type.nbytes)
            except AssertionError as error:
                self.errors.append(error)

    def load(self, source: Descriptor, coordinates: list[int], barrier: Barrier, target: Shared) -> None:
        target.tensor.fill_(torch.nan)
        self.copies.put((source, coordinates, barrier, target))

    def save(self, target: Descriptor, coordinates: list[int], source: Shared) -> None:
        stored = {tile for _, tile in list(UNFENCED)}
        assert source.tensor.data_ptr() not in stored, "the copy may not see the stores before it"
        part = target.part(coordinates)
        part.copy_(source.tensor[: part.shape[0], : part.shape[1]])


def _wait(barrier: Barrier, parity: int) -> None:
    with barrier.changed:
        if not barrier.changed.wait_for(lambda: barrier.phase % 2 != parity, WAIT):
            raise AssertionError("a barrier that nobody reaches")


def _initialise(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.left = count


def _arrive(barrier: Barrier) -> None:
    barrier.update(1, 0)
    time.sleep(REST)


def _fence() -> None:
    mine = threading.get_ident()
    UNFENCED.difference_update([entry for entry in list(UNFENCED) if entry[0] == mine])


BARRIERS = types.SimpleNamespace(
    init=_initialise,
    wait=_wait,
    MBarrierLayout=lambda: "barrier",
    expect=lambda barrier, size: barrier.update(1, size),
    arrive=_arrive,
)


class Emulated:
    """`kernel` with a launch's syntax: `Emulated(module, "forward_kernel")[grid](*arguments, **constants)`."""

    def __init__(self, module: types.ModuleType, name: str) -> None:
        self.module, self.name = module, name

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *given, **constants: self._launch(grid, given, constants)

    def _launch(self, grid: tuple[int, int, int], given: tuple[Any, ...], constants: dict[str, Any]) -> None:
        constants.pop("num_warps")
        places = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        for place in random.sample(places, len(places)):
            machine = Machine(place, grid)
            UNFENCED.clear()
            engine = threading.Thread(target=machine.copy_engine, daemon=True)
            engine.start()
            try:
                self._functions(machine)[self.name](*(_argument(x) for x in given), **constants)
            finally:
                machine.copies.put(None)
                engine.join()
            if machine.errors:
                raise machine.errors[0]

    def _functions(self, machine: Machine) -> dict[str, Any]:
        """The module's names with Gluon's replaced, and its functions as Python ones that see these names."""
        names = dict(vars(self.module))
        names |= {
            "gl": machine.language(), "mbarrier": BARRIERS, "fence_async_shared": _fence,
            "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=machine.load, async_copy_shared_to_global=machine.save,
                store_wait=lambda pending: None,
            ),
        }  # fmt: skip
        for name, value in vars(self.module).items():
            if hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
            elif type(value).__name__ == "constexpr":
                names[name] = value.value
        return names


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(x.detach().view(-1))
    return Descriptor(x) if hasattr(x, "block_shape") else x
