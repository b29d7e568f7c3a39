"""What is recorded as a CUDA graph must be the same kernels every time: which recipes `train.cuda_graph` covers
(`megalite.train.step_graph`), and which the graph of a token in generation (`megalite.generation.token_graph`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megalite.config.bounds import shown
from megalite.config.schema import Config

_COVERED = {
    "objective.kind": ("next_token", "sft"),
    "parallel.pipeline": (1,),
    "parallel.context": (1,),
    "parallel.zero": (0, 1),
    "parallel.two_batch_overlap": (False,),
    "model.experts": (0,),
    "train.invariant": (0,),
    "train.fp8": ("none",),
    "train.batch_ramp": ((),),
}
"""The values of a field with which a step may be recorded; others have not been shown to be repeatable."""

TOKENS: Mapping[str, tuple[object, ...]] = {
    "parallel.pipeline": (1,),
    "parallel.virtual_stages": (1,),
    "parallel.context": (1,),
    "model.attention": ("gqa",),
    "model.experts": (0,),
    "train.fp8": ("none",),
    "train.batch_invariant": (False,),
}
"""The same for a token: other forms of attention read the cache by a length that the host knows."""

Refuse = Callable[[Config, str, str, str], object]


def check_graph(config: Config, refuse: Refuse) -> None:
    """Call `refuse` for the first field that does not fit `train.cuda_graph` or `rollout.cuda_graph`."""
    for field, covered in (("train.cuda_graph", _COVERED), ("rollout.cuda_graph", TOKENS)):
        if not value_at(config, field):
            continue
        if config.run.device == "cpu":
            refuse(config, field, "needs a GPU, and run.device is cpu", "use false, or another device")
        check_covered(config, covered, f"{field} = true", f"{field} = false", refuse)


def check_covered(
    config: Config, covered: Mapping[str, tuple[object, ...]], switch: str, off: str, refuse: Refuse
) -> None:
    """Call `refuse` for the first field whose value is not among those that `switch` covers."""
    for path, values in covered.items():
        if value_at(config, path) not in values:
            remedy = f"use {' or '.join(map(shown, values))}, or {off}"
            refuse(config, path, f"is not covered by {switch}", remedy)


def value_at(config: Config, path: str) -> Any:
    """The value of the field at `section.name`."""
    section, name = path.split(".")
    return getattr(getattr(config, section), name)
