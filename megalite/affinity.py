"""Which cores a rank runs on: those of its GPU's NUMA node, as far as it may choose."""

from __future__ import annotations

import logging
import os
from pathlib import Path

LEAST_CORES = 4
"""A rank on a GPU has main thread, autograd, NCCL's proxy, and threads that read data and write checkpoints."""

log = logging.getLogger("megalite")


def parse_cores(text: str) -> set[int]:
    """Linux's list format, as in `0-15,64-79`."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores


def own_cores() -> set[int]:
    """Those on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def stay_near(pci_address: str, devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Keep this thread, and those that it will start, on the cores beside a PCI device (`0000:1b:00.0`).

    Nothing changes where the machine does not tell them, or where fewer than `LEAST_CORES` of ours are among them:
    then someone has bound this process to others.
    """
    try:
        near = parse_cores((devices / pci_address / "local_cpulist").read_text()) & own_cores()
        if len(near) >= LEAST_CORES:
            os.sched_setaffinity(0, near)
            log.debug("on the %d cores beside GPU %s", len(near), pci_address)
    except (OSError, ValueError, AttributeError):
        return
