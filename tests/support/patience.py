"""How a test waits for what must come."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

PATIENCE_SECONDS = 240.0
"""Only what never comes is waited for so long: a busy machine takes many times what an idle one does."""


def wait_until(
    condition: Callable[[], object],
    *processes: subprocess.Popen[str] | subprocess.Popen[bytes],
    told: Callable[[], object] = str,
    interval: float = 0.05,
) -> None:
    """Poll until `condition` holds.

    Args:
        condition: a FileNotFoundError in it means "not yet".
        processes: which have to run until then.
        told: what a failure shows besides.
        interval: seconds between two looks.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _holds(condition):
        ended = [process.args for process in processes if process.poll() is not None]
        assert not ended, f"{ended} ended first: {told()}"
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS:.0f} s: {told()}"
        time.sleep(interval)


def _holds(condition: Callable[[], object]) -> bool:
    try:
        return bool(condition())
    except FileNotFoundError:
        return False
