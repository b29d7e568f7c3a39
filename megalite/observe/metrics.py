"""The metrics of each step: one JSON object per line in metrics.jsonl."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from megalite.model.cost import peak_flops
from megalite.observe.lines import LineFile, iterate_lines
from megalite.observe.timeline import memory_gib

METRICS = "metrics.jsonl"
_NOT_DRAWN = ("step", "time", "extra")
_LAST_SHARE, _LAST_STEPS = 0.02, 100
"""The final training loss is the mean over this share of the steps, and at most this number of steps."""
_LARGEST = 1e18
_MOST_SECONDS = 1e13


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Times in seconds; `tokens`, `skipped_samples` and `rollbacks` count from the start.

    `loss` is null for a step that was refused, or whose batch held nothing to learn. `memory_gib` is the peak of rank
    0: allocated GPU memory, or resident memory on CPUs. `mfu` is a fraction of the device's dense bf16 peak by the
    formula in `megalite.model.cost`. `optimizer_seconds` is what rank 0 spent on the update, Muon's exchanges included
    (on GPUs in the step before, whose events can be read without waiting). `time` is the end of the step, including its
    checkpoint, in seconds since 1970.
    `extra` are further numbers (such as an objective's accuracy), each written under its own name.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    memory_gib: float
    validation_loss: float | None
    save_stall_seconds: float
    skipped_samples: int
    rollbacks: int
    validation_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    time: float = field(default_factory=time.time)
    extra: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := {each.name for each in fields(self)} & set(self.extra):
            raise ValueError(f"further metrics may not take the names {', '.join(sorted(taken))}")

    def row(self) -> dict[str, Any]:
        """The metrics as JSON values; non-finite numbers become null."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "extra"}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (own | dict(self.extra)).items()
        }

    def numbers(self) -> dict[str, float]:
        """Every finite number by name, for trackers."""
        return {key: value for key, value in self.row().items() if value is not None and key not in _NOT_DRAWN}


class SpeedMeter:
    """Turns the seconds of a step into tokens per second, TFLOP/s per device and MFU."""

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.world_size, self.device = world_size, device
        self.peak = peak_flops(device)

    def rates(self, tokens: int, flops: float, seconds: float) -> dict[str, Any]:
        per_device = flops / max(seconds, 1e-9) / self.world_size
        return {
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "tflops_per_device": per_device / 1e12,
            "mfu": per_device / self.peak if self.peak else None,
        }

    def memory_gib(self) -> float:
        return memory_gib(self.device)


def number(value: Any) -> float | None:
    """`value` as a finite number of reasonable size; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def moment(value: Any) -> float | None:
    """`value` as seconds since 1970, or of a duration, that the clock of a run can show; None for anything else."""
    seconds = number(value)
    return seconds if seconds is not None and 0 <= seconds <= _MOST_SECONDS else None


def whole(value: Any) -> int | None:
    """`value` if it is a non-negative integer below 2^53; None for anything else."""
    return value if type(value) is int and 0 <= value < 1 << 53 else None


_READ = {"time": moment, "step_seconds": moment, "save_stall_seconds": moment, "validation_seconds": moment}


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file that belong to a step, one at a time; non-numeric values become None."""
    for row in iterate_lines(path):
        if whole(row.get("step")) is not None:
            yield {key: value if key == "step" else _READ.get(key, number)(value) for key, value in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of `iterate_metrics`; a last line truncated by a crash is dropped."""
    return list(iterate_metrics(path))


def final_losses(losses: Sequence[float | None], validation: Iterable[float | None]) -> tuple[float, float]:
    """(training, validation) loss at the end of a run; nan if there is none.

    One batch is noise, so the training loss is the mean over the last 2 % of the steps, at most 100.
    """
    recent = losses[-max(1, min(_LAST_STEPS, round(_LAST_SHARE * len(losses)))) :]
    finite = [loss for loss in recent if loss is not None and math.isfinite(loss)]
    checked = [loss for loss in validation if loss is not None and math.isfinite(loss)]
    return statistics.fmean(finite) if finite else math.nan, checked[-1] if checked else math.nan


def describe_losses(training: float, validation: float) -> str:
    """`final_losses` as text, validation first."""
    parts = [f"validation loss {validation:.3f}"] if math.isfinite(validation) else []
    parts += [f"training loss {training:.3f}"] if math.isfinite(training) else []
    return ", ".join(parts)


class MetricsFile:
    """metrics.jsonl of a run; rank 0 writes it."""

    def __init__(self, run_dir: Path | str) -> None:
        self._file = LineFile(Path(run_dir) / METRICS, "rank 0")

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after `step`, as those steps will be repeated; returns the dropped rows."""
        return self._file.cut(lambda row: (whole(row.get("step")) or 0) <= step)

    def write(self, metrics: StepMetrics) -> None:
        self._file.write(metrics.row())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All lines, including those of earlier starts, one at a time."""
        return iterate_metrics(self._file.path)

    def close(self) -> None:
        self._file.close()
