"""Two forward passes that take turns, so that what one sends is on its way while the other computes.

Each runs until the layers `give` its turn away: before the result of a collective is waited for, and before the product
of a row-parallel layer, so that in the middle of one pass's layer the other can start its next gather. On a GPU nothing
but the order in which the host starts operations changes: both passes share one stream. The first pass keeps its first
turn, so that it is in its feed-forward layers while the second is in its attention.

Both record a graph for backward of their own, each in its thread, since modes of autograd and of `checkpoint` belong to
threads. One runs at a time, and the order of turns depends on the layers alone: all ranks of a group start the same
collectives in the same order.

Sources: DeepSeek-AI 2024 (DeepSeek-V3, section 3.4.1: two micro-batches at once); Wang et al. 2024 (Domino).
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class _Abandoned(BaseException):
    """The other pass has failed."""


class _Second(threading.Thread):
    """The second pass: it runs between `resume` and the next `give_back`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="second forward pass", daemon=True)
        self._work, self._context = work, contextvars.copy_context()
        self._grad = torch.is_grad_enabled()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._wait()
            with torch.set_grad_enabled(self._grad), torch.cuda.stream(self._stream):
                self.result = self._context.run(self._work)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._theirs.release()

    def _wait(self) -> None:
        self._mine.acquire()
        if self._stopped:
            raise _Abandoned

    def resume(self) -> None:
        """In the first pass: let this one have its turn. Raises what it has raised."""
        if not self.ended:
            self._mine.release()
            self._theirs.acquire()
        if self.error is not None:
            raise self.error

    def give_back(self) -> None:
        self._theirs.release()
        self._wait()

    def stop(self) -> None:
        """End it, at its next turn if it has not ended yet."""
        self._stopped = True
        self._mine.release()
        self.join()


class Turns:
    """The turns of the layers of one model."""

    def __init__(self) -> None:
        self._second: _Second | None = None
        self._leads = False

    @property
    def taken(self) -> bool:
        """Whether two passes are under way."""
        return self._second is not None

    def run(self, first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
        """The results of both; an exception of either ends both and is raised here."""
        self._second, self._leads = _Second(second), True
        self._second.start()
        try:
            result = first()
            while not self._second.ended:
                self._second.resume()
            self._second.resume()
            return result, self._second.result
        finally:
            self._second.stop()
            self._second = None

    def give(self) -> None:
        """Let the other pass go on, if there is one."""
        if self._second is None:
            return
        if threading.current_thread() is self._second:
            self._second.give_back()
        elif self._leads:
            self._leads = False
        else:
            self._second.resume()
