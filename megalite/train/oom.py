"""Out of memory: a report of what this rank holds and what the planner expected, and a memory snapshot."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.config import Config
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.observe.timeline import memory_gib
from megalite.placement import placed_parameters
from megalite.planning import DEVICES, Job
from megalite.planning.memory import rank_memory
from megalite.train.trainer import Trainer

log = logging.getLogger("megalite")

_CPU_MESSAGES = ("can't allocate memory", "not enough memory")
_HISTORY = 50_000
_DEPTH = 6
"""Maximum depth of the search for tensors in the trainer's attributes."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)


def record_allocations(device: torch.device, on: bool) -> None:
    """Turn CUDA's allocation history, which the snapshot needs, on or off."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(enabled="all" if on else None, stacks="python", max_entries=_HISTORY)


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Exact bytes of this rank's tensors by part, every storage counted once. Reads tensors, allocates nothing."""
    parameters = [parameter for stage in trainer.stages.values() for parameter in placed_parameters(stage)]
    parts: Mapping[str, Any] = {
        "parameters": [parameter.data for parameter in parameters],
        "gradients": [parameter.main_grad for parameter in parameters],
        "optimizer": trainer.optimizer,
        "other buckets": trainer.buckets,
    }
    seen: set[int] = set()
    return {name: sum(_new_storages(part, seen)) for name, part in parts.items()}


def _new_storages(thing: Any, seen: set[int]) -> Iterator[int]:
    for tensor in _tensors(thing, set(), 0):
        storage = tensor.untyped_storage()
        if storage.size() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()


def _tensors(thing: Any, visited: set[int], depth: int) -> Iterator[Tensor]:
    """All tensors in nested containers and in the attributes of megalite's objects."""
    if isinstance(thing, Tensor):
        yield thing
        return
    if depth > _DEPTH or id(thing) in visited:
        return
    visited.add(id(thing))
    children: Any = ()
    if isinstance(thing, Mapping):
        children = thing.values()
    elif isinstance(thing, list | tuple | set):
        children = thing
    elif type(thing).__module__.startswith("megalite.") and hasattr(thing, "__dict__"):
        children = vars(thing).values()
    for child in children:
        yield from _tensors(child, visited, depth + 1)


def explain_memory(error: BaseException, config: Config, mesh: Mesh, trainer: Trainer, folder: Path) -> None:
    """Log what the rank holds and what was planned; on GPUs leave a snapshot in `folder`."""
    lines = [f"rank {mesh.rank}: memory ran out: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"]
    held = held_bytes(trainer)
    lines += [f"  {name:<16} {size / 2**30:9.3f} GiB held" for name, size in held.items()]
    lines.append(f"  {'peak so far':<16} {memory_gib(mesh.device):9.3f} GiB")
    lines += [f"  planned {name:<20} {size / 2**30:9.3f} GiB" for name, size in planned_bytes(config, mesh).items()]
    lines.append(f"  {_remedy(config)}")
    if snapshot := _snapshot(mesh, folder):
        lines.append(f"  snapshot: {snapshot}; https://pytorch.org/memory_viz shows it")
    log.error("%s", "\n".join(lines))


def planned_bytes(config: Config, mesh: Mesh) -> Mapping[str, float]:
    """The planner's estimate for this rank's pipeline rank, by part; empty if it has none."""
    name = torch.cuda.get_device_name(mesh.device).lower() if mesh.device.type == "cuda" else "cpu"
    kind = next((kind for kind in DEVICES if kind in name), None)
    if kind is None:
        return {}
    try:
        return rank_memory(Job.of(config, mesh.size, DEVICES[kind]), mesh.index("pp")).parts
    except (UserError, ValueError, KeyError) as error:
        log.info("no estimate from the planner: %s", error)
        return {}


def _remedy(config: Config) -> str:
    train, parallel = config.train, config.parallel
    steps = [f"train.micro_batch_size = {train.micro_batch_size} lower"] if train.micro_batch_size > 1 else []
    if config.objective.data_format == "prompt":
        steps.append(
            f"rollout.batch_size = {config.rollout.batch_size} {'lower' if config.rollout.batch_size else 'set'}"
        )
    if train.recompute != "full":
        steps.append(
            f"train.recompute = {train.recompute} to {'selective or ' if train.recompute == 'none' else ''}full"
        )
    if parallel.zero < 3:
        steps.append(f"parallel.zero = {parallel.zero} higher")
    steps.append(f"parallel.tensor = {parallel.tensor} or parallel.pipeline = {parallel.pipeline} higher")
    return "what helps, cheapest first: " + "; ".join(steps)


def _snapshot(mesh: Mesh, folder: Path) -> Path | None:
    if mesh.device.type != "cuda":
        return None
    path = folder / f"memory_rank_{mesh.rank:05d}.pickle"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        log.warning("rank %d: no memory snapshot: %s", mesh.rank, error)
        return None
    return path
