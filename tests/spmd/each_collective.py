"""Leave out every collective of a training step in turn, or do it twice, and see that a layout no longer trains alike.

    python -m tests.spmd.each_collective

The steps are those of `tests/spmd/test_virtual.py`. A collective is the line that asks for it. Without it, a rank goes
on with what it has itself, in the shape that was asked for. Takes some five minutes and prints what was not noticed:
three sums of the experts' loads may be done twice, since loads are ratios; `tests/spmd/test_types.py` refuses them.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

from torch import Tensor

from megalite.mesh import DONE, Work
from tests.spmd.test_virtual import CASES, LAYOUTS, PAIRS, tolerance
from tests.support.parity import assert_close, train_alone, train_virtually
from tests.support.virtual import VirtualGroup

Pair = tuple[str, str]
BELOW = ("mesh.py", "virtual.py", "collectives.py", "pieces.py", "each_collective.py")
"""Files whose functions ask on behalf of others."""

SUMS = ("all_reduce", "reduce_scatter")


def line_that_asks() -> str:
    frame = sys._getframe(1)
    while frame.f_code.co_filename.split("/")[-1] in BELOW:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename.split('/megalite/')[-1]}:{frame.f_lineno} {frame.f_code.co_name}"


@dataclass
class Watch:
    """Where collectives are asked for by which pairs, and the one that is to go wrong."""

    asked: dict[tuple[str, str], set[Pair]] = field(default_factory=lambda: defaultdict(set))
    pair: Pair = ("", "")
    wrong: tuple[str, str] | None = None
    times: int = 0

    def around(self, name: str, collective: Callable[..., Work]) -> Callable[..., Work]:
        """The collective, asked for once, or for `wrong` so many `times`."""

        def call(group: VirtualGroup, *arguments: object) -> Work:
            place = (name, line_that_asks())
            if group.size > 1:
                self.asked[place].add(self.pair)
            if group.size == 1 or place != self.wrong:
                return collective(group, *arguments)
            if self.times == 2 and name == "all_reduce":
                collective(group, *arguments).wait()
            elif self.times == 2:
                group.all_reduce(arguments[1]).wait()  # type: ignore[arg-type]
            elif name != "all_reduce":
                _own(group, *arguments)  # type: ignore[arg-type]
                return DONE
            return collective(group, *arguments) if self.times == 2 else DONE

        return call


def _own(group: VirtualGroup, output: Tensor, tensor: Tensor, *counts: Sequence[int]) -> None:
    """Fill `output` with what this rank has itself."""
    own, wanted = tensor.detach().reshape(-1), output.detach().view(-1)
    if own.numel() > wanted.numel() and not counts:
        own = own.view(group.size, -1)[group.index]
    repeated = own.repeat(1 + wanted.numel() // max(1, own.numel()))
    wanted.zero_()[: repeated.numel()].copy_(repeated[: wanted.numel()])


def noticed(pairs: Sequence[Pair]) -> bool:
    for case, layout in pairs:
        try:
            assert_close(train_virtually(CASES[case], LAYOUTS[layout]), train_alone(CASES[case]), tolerance(case))
        except Exception:
            return True
    return False


def main() -> int:
    watch, seconds = Watch(), {}
    names = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    with mock.patch.multiple(VirtualGroup, **{name: watch.around(name, getattr(VirtualGroup, name)) for name in names}):
        for watch.pair in PAIRS:
            began = time.process_time()
            assert not noticed([watch.pair]), watch.pair
            seconds[watch.pair] = time.process_time() - began
        places = {place: sorted(pairs, key=seconds.__getitem__) for place, pairs in sorted(watch.asked.items())}
        tried = missed = 0
        for (name, place), pairs in places.items():
            for watch.times in (0, 2) if name in SUMS else (0,):
                watch.wrong = (name, place)
                tried += 1
                if not noticed(pairs):
                    missed += 1
                    print(f"NOT NOTICED: {'twice' if watch.times else 'without'} {name} of {place}", flush=True)
    print(f"{tried - missed} of {tried} errors noticed, at {len(places)} places")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
