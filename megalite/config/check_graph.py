"""What `train.cuda_graph` covers: steps that are the same kernels every time (`megalite.train.step_graph`)."""

from __future__ import annotations

from collections.abc import Callable

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


def check_graph(config: Config, refuse: Callable[[Config, str, str, str], object]) -> None:
    """Call `refuse` for the first field that does not fit `train.cuda_graph`."""
    if not config.train.cuda_graph:
        return
    if config.run.device == "cpu":
        refuse(config, "train.cuda_graph", "needs a GPU, and run.device is cpu", "use false, or another device")
    for path, covered in _COVERED.items():
        section, name = path.split(".")
        if getattr(getattr(config, section), name) not in covered:
            remedy = f"use {' or '.join(map(shown, covered))}, or train.cuda_graph = false"
            refuse(config, path, "is not covered by train.cuda_graph = true", remedy)
