"""Which cores a rank runs on: those of its GPU's NUMA node, as far as it may choose."""

from __future__ import annotations

import ctypes
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


def pci_address(gpu: int, library: str = "libcuda.so.1") -> str:
    """Where the GPU that CUDA counts as `gpu` in this process sits, as in `0000:1b:00.0`; empty where nobody knows."""
    try:
        driver = ctypes.CDLL(library)
        device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), gpu):
            return ""
        return "" if driver.cuDeviceGetPCIBusId(text, len(text), device) else text.value.decode().lower()
    except (OSError, AttributeError):
        return ""


def stay_near(address: str, devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Keep this thread, and those that it will start, on the cores near a PCI device.

    Does nothing if the machine does not report them, or if fewer than `LEAST_CORES` of ours are among them:
    then someone has bound this process to others.
    """
    try:
        near = parse_cores((devices / address / "local_cpulist").read_text()) & own_cores()
        if len(near) >= LEAST_CORES:
            os.sched_setaffinity(0, near)
            log.debug("on the %d cores beside GPU %s", len(near), address)
    except (OSError, ValueError, AttributeError):
        return
