"""Correctness and bandwidth of the collectives along every axis of a run's mesh."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from megalite.config import Config
from megalite.doctor.findings import FAULT, Finding, TimeLimit
from megalite.mesh import Group, Mesh
from megalite.runtime import World

_TIMEOUT = timedelta(seconds=60)
_MEASURED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
_ROUNDS = 5


def look_at_collectives(
    config: Config, world: World, host: str, store: Store, limit: TimeLimit, on_mesh: bool
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings of this rank, and {axis: {ranks, gigabytes_per_second}} of every axis of more than one rank.

    Without a mesh (one process a node) only the group of all ranks is looked at.
    """
    gpu = config.run.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    findings: list[Finding] = []
    links: dict[str, Any] = {}
    axis = "start"
    try:
        if gpu:
            torch.cuda.set_device(device)
        limit.check = "collectives: making groups"
        prefix = PrefixStore("group", store)
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=prefix, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
        parallel = config.parallel
        sizes = (
            {
                "pp": parallel.pipeline,
                "dp": config.data_parallel(world.size) // parallel.expert,
                "ep": parallel.expert,
                "cp": parallel.context,
            }
            if on_mesh
            else {}
        )
        sizes |= {"tp": parallel.tensor} if on_mesh else {"dp": world.size}
        mesh = Mesh(**sizes, rank=world.rank, device=device)  # type: ignore[arg-type]
        groups = {axis: mesh.group(axis) for axis in ("tp", "cp", "ep", "dp", "pp")}
        for axis, group in groups.items():
            if group.size == 1:
                continue
            limit.check = f"collectives along {axis}"
            _check(group, device)
            links[axis] = {"ranks": group.ranks, "gigabytes_per_second": _bandwidth(group, device)}
    except (RuntimeError, ValueError, AssertionError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        remedy = "NCCL_DEBUG=INFO (or GLOO_SOCKET_IFNAME) tells which interface is taken; check that link"
        where = f"rank {world.rank} ({host})"
        findings.append(Finding(FAULT, f"collectives along {axis}", where, said, remedy))
    return findings, links


def _check(group: Group, device: torch.device) -> None:
    """Small integers, so that every sum is exact; raises AssertionError if a collective gives something else."""
    size, own = group.size, group.index
    every = torch.arange(1, size + 1, dtype=torch.float32, device=device)
    pattern = torch.arange(size * 3, dtype=torch.float32, device=device)
    total = pattern * (own + 1)
    group.all_reduce(total).wait()
    _expect("all-reduce", total, pattern * every.sum())
    gathered = torch.empty(size * 2, device=device)
    group.all_gather(gathered, torch.full((2,), float(own + 1), device=device)).wait()
    _expect("all-gather", gathered, every.repeat_interleave(2))
    part = torch.empty(3, device=device)
    group.reduce_scatter(part, pattern * (own + 1)).wait()
    _expect("reduce-scatter", part, (pattern * every.sum())[3 * own : 3 * own + 3])
    rows = [other + own + 1 for other in range(size)]  # of every length, and as many there as back
    exchanged = torch.empty(sum(rows), device=device)
    group.all_to_all(exchanged, torch.full((sum(rows),), float(own + 1), device=device), rows, rows).wait()
    _expect("all-to-all", exchanged, every.repeat_interleave(torch.tensor(rows, device=device)))
    received = torch.empty(4, device=device)
    sending = torch.full((4,), float(own + 1), device=device)
    after, before = (own + 1) % size, (own - 1) % size
    if own % 2 == 0:
        works = [group.send(sending, after), group.receive(received, before)]
    else:
        works = [group.receive(received, before), group.send(sending, after)]
    for work in works:
        work.wait()
    _expect("send and receive", received, torch.full_like(received, float(before + 1)))


def _expect(name: str, found: torch.Tensor, right: torch.Tensor) -> None:
    if not torch.equal(found, right):
        raise AssertionError(f"{name} gives {found.tolist()[:6]} where {right.tolist()[:6]} is right")


def _bandwidth(group: Group, device: torch.device) -> float:
    """Bus bandwidth of the best all-reduce in GB/s: 2 (n - 1) / n of the bytes pass through every rank."""
    numbers = torch.zeros(_MEASURED_BYTES[device.type] // 4, device=device)
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        group.all_reduce(numbers).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * (group.size - 1) / group.size * numbers.numel() * 4 / best / 1e9
