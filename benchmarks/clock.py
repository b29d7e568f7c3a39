"""How single calls are timed, and the copy bandwidth of a device, which bounds what moves memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Times one call at a time with cold caches: in seconds of the device, or in CPU seconds of this process."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush = torch.empty((256 if self.cuda else 64) << 20, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            self.flush.zero_()
            start = time.process_time()
            call()
            return time.process_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(4):  # long enough for the host to run ahead: the device then measures itself, not the launches
            self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def cpu_seconds(call: Callable[[], Any], repeat: int) -> float:
    """CPU seconds of this process, the median of some calls after one that does not count."""
    call()
    measured = []
    for _ in range(repeat):
        began = time.process_time()
        call()
        measured.append(time.process_time() - began)
    return statistics.median(measured)


def copy_rate(device: torch.device, clock: Clock) -> float:
    """Bytes a second that a large copy reads and writes, the best of ten."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(clock(lambda: target.copy_(source)) for _ in range(10))
