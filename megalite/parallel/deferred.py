"""Weight gradients that wait for the next collective of their backward pass, to be computed beside it.

Nothing else in backward needs a weight's gradient, so it may be computed whenever a product is wanted to hide what the
tensor ranks send: that of a column-parallel layer while the layer before gathers its output's gradient, and that of a
row-parallel layer while the layer before sums its input's gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch.autograd import Variable


class Deferred:
    """The products put off by one stage; empty again at the end of every backward pass."""

    def __init__(self) -> None:
        self._actions: deque[Callable[[], object]] = deque()

    def put(self, action: Callable[[], object]) -> None:
        """Within a backward pass: run `action` at the next `run`, at the latest when the pass ends."""
        if not self._actions:
            Variable._execution_engine.queue_callback(self.run)  # type: ignore[attr-defined]
        self._actions.append(action)

    def run(self) -> None:
        """Run what was put off; each is dropped, with all that it kept, as soon as it is done."""
        if not self._actions:
            return
        with torch.no_grad():
            while self._actions:
                self._actions.popleft()()
