"""Profiling: torch's profiler over some steps, NVTX ranges for Nsight, and a report when memory runs out.

`train.profile = [first, last]` writes one Chrome trace for each of these steps and ranks, with the pipeline's
operations named in it (`2F0`). Under `nsys profile` the same steps get NVTX ranges and start and stop its capture
(`--capture-range=cudaProfilerApi`), and torch's profiler, which cannot share the GPU's counters, keeps out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megalite.config import Config
from megalite.mesh import Mesh
from megalite.observe.timeline import Recorder
from megalite.train.oom import explain_memory, is_out_of_memory, record_allocations
from megalite.train.trainer import Trainer

FOLDER = "profile"
_NSIGHT = "NSYS_PROFILING_SESSION_ID"
"""Set by `nsys profile` in the processes that it watches."""
_RECORDED_STEPS = 2
"""Steps of a start for which allocations are recorded: memory usually runs out in the first ones."""


class Profiler:
    """Wraps each step of one rank."""

    def __init__(self, config: Config, mesh: Mesh, trainer: Trainer, recorder: Recorder) -> None:
        self.config, self.mesh, self.trainer, self.recorder = config, mesh, trainer, recorder
        self.folder = Path(config.run.dir) / FOLDER
        self._steps = 0
        record_allocations(mesh.device, True)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the step if it is one of `train.profile`; explain it if memory runs out."""
        window = self.config.train.profile
        profiled = bool(window) and window[0] <= number <= window[-1]
        self._steps += 1
        if profiled or self._steps == _RECORDED_STEPS + 1:
            record_allocations(self.mesh.device, profiled)
        try:
            with self._record(number) if profiled else contextlib.nullcontext():
                yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                explain_memory(error, self.config, self.mesh, self.trainer, self.folder)
            raise
        if profiled and number == window[-1]:
            record_allocations(self.mesh.device, False)

    @contextlib.contextmanager
    def _record(self, number: int) -> Iterator[None]:
        self.recorder.naming = True
        try:
            if self.mesh.device.type == "cuda" and _NSIGHT in os.environ:
                with torch.cuda.profiler.profile(), torch.cuda.nvtx.range(f"step {number}"):
                    yield
                return
            with torch.profiler.profile(record_shapes=True) as profiler:
                yield
        finally:
            self.recorder.naming = False
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{number:08d}_rank_{self.mesh.rank:05d}.json"
        profiler.export_chrome_trace(str(path))
