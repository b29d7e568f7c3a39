"""What one step of the training loop does: its trainers and frozen models, its data, its state.

The loop, recovery, checkpoints, stop requests and the report serve all tasks unchanged. `GradientTask` is pretraining,
supervised fine-tuning and the reward model: one trainer, one optimizer step from a batch. `megalite.train.start`
chooses among the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.state import Checkpointable
from megalite.config import Config
from megalite.kernels import Kernels
from megalite.mesh import Mesh
from megalite.objective.work import Work, flops_per_token, passes_of
from megalite.observe.timeline import Recorder
from megalite.train.invariant_trainer import build_trainer
from megalite.train.reader import Reader
from megalite.train.trainer import StepResult, Trainer

Flag = Callable[[], float]
"""A rank's request to stop, 1 or 0; the sum over the ranks comes back as `StepResult.flags`."""

Phase = Callable[[str], AbstractContextManager[None]]
"""Times a named part of a step."""


class Task(Protocol):
    """One step of the plan, and what it needs. All ranks make the same calls in the same order."""

    trainer: Trainer
    """The model that the run is for."""

    @property
    def saved(self) -> Checkpointable:
        """What a checkpoint holds."""
        ...

    def open(self, train: Any, valid: Any, eod: int | None) -> None:
        """Take the data; `eod` is the tokenizer's end-of-document id."""
        ...

    def observe(self, recorder: Recorder) -> None:
        """Tell `recorder` the pipeline operations and phases of each step."""
        ...

    def begin(self, checkpoints: CheckpointManager) -> dict[str, Any]:
        """Fill the models of a new run, from `checkpoint.load` or with initial weights; the loop's state if the source
        has one, else an empty table."""
        ...

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Called once the trained models are filled, after `begin` or from a checkpoint whose `state` of the task was
        saved by `state()` (empty for a new run): load frozen models."""
        ...

    def state(self) -> dict[str, Any]:
        """The task's own state, as JSON values, for checkpoints."""
        ...

    def step(self, first: int, samples: int, lr: float, flag: Flag) -> tuple[StepResult, Work]:
        """One step from the global samples [first, first + samples); `flag` is asked as late as possible."""
        ...

    def validate(self) -> tuple[float, Mapping[str, float]]:
        """(loss on the validation data, nan if nothing counts; further metrics by name)."""
        ...

    def close(self) -> None: ...


class GradientTask:
    """One optimizer step of one trainer from each global batch."""

    def __init__(self, config: Config, mesh: Mesh, kernels: Kernels) -> None:
        self.config, self.mesh = config, mesh
        self.trainer = build_trainer(config, mesh, kernels)
        self.phase: Phase = lambda name: nullcontext()
        self._readers: list[Reader] = []
        self._flops_per_token = flops_per_token(passes_of(config), config.train.seq_length)

    @property
    def saved(self) -> Checkpointable:
        return self.trainer

    def open(self, train: Any, valid: Any, eod: int | None) -> None:
        self._readers = [Reader(self.config, self.mesh, self.trainer, samples, eod) for samples in (train, valid)]

    def observe(self, recorder: Recorder) -> None:
        self.phase, self.trainer.observe = recorder.phase, recorder.observe

    def begin(self, checkpoints: CheckpointManager) -> dict[str, Any]:
        source = self.config.checkpoint.load
        self.trainer.initialise_before(source)
        if not source:
            return {}
        return checkpoints.load(self.trainer, source, optimizer=self.config.checkpoint.load_optimizer)

    def prepare(self, state: Mapping[str, Any]) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def complete(self, batches: Sequence[Any]) -> Sequence[Any]:
        """This rank's micro-batches with all that the objective reads."""
        return batches

    def step(self, first: int, samples: int, lr: float, flag: Flag) -> tuple[StepResult, Work]:
        with self.phase("data"):
            batches = self._readers[0].read(first, samples)
        result = self.trainer.step(self.complete(batches), lr, flag())
        tokens = samples * self.config.train.seq_length
        return result, Work(tokens, tokens * self._flops_per_token)

    def validate(self) -> tuple[float, Mapping[str, float]]:
        batches = self._readers[1].read(0, self.config.train.eval_samples)
        if self.config.objective.data_format == "preference":
            loss, units, metrics = self.trainer.measure(self.complete(batches))
            named = {f"validation_{name}": value for name, value in metrics.items()}
            return (loss, named) if units else (math.nan, {})
        loss, tokens = self.trainer.evaluate(batches)
        return (loss / tokens if tokens else math.nan), {}

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
