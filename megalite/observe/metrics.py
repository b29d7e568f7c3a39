"""What a run tells: one JSON object a step in metrics.jsonl, TensorBoard and Weights & Biases, and the loss curve."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalite.config import Config
from megalite.model.cost import peak_flops, training_flops_per_token
from megalite.observe.lines import LineFile, read_lines
from megalite.observe.timeline import memory_gib

_NOT_DRAWN = ("step", "time")


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Times in seconds; `tokens`, `skipped_samples` and `rollbacks` count from the start.

    `memory_gib` is the peak of rank 0: allocated GPU memory, or resident memory on CPUs. `mfu` is a fraction of the
    device's dense bf16 peak by the formula in `megalite.model.cost`. `loss` is null for a step that was refused.
    `time` is when the step was over, checkpoint and all, in seconds since 1970.
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
    time: float = field(default_factory=time.time)

    def row(self) -> dict[str, Any]:
        """As JSON can hold it: what is not finite becomes null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


class SpeedMeter:
    """Turns the seconds of a step into tokens per second, TFLOP/s per device and MFU."""

    def __init__(self, config: Config, world_size: int, device: torch.device) -> None:
        self.flops_per_token = training_flops_per_token(config.model, config.train.seq_length)
        self.world_size, self.device = world_size, device
        self.peak = peak_flops(device)

    def rates(self, tokens: int, seconds: float) -> dict[str, Any]:
        per_device = tokens / seconds * self.flops_per_token / self.world_size
        return {
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": per_device / 1e12,
            "mfu": per_device / self.peak if self.peak else None,
        }

    def memory_gib(self) -> float:
        return memory_gib(self.device)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line cut short by a crash is left out."""
    return [row for row in read_lines(path) if isinstance(row.get("step"), int)]


class MetricsLog:
    """Appends step metrics to every configured place. Only rank 0 has one.

    Resuming at step n, `rewind(n)` drops the lines after n: those steps are about to be run again.
    """

    def __init__(self, config: Config, resumed_step: int) -> None:
        run = Path(config.run.dir)
        self._file = LineFile(run / "metrics.jsonl", "rank 0")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)
        if config.log.wandb:
            import wandb  # type: ignore[import-not-found]

            self._wandb = wandb.init(project="megalite", dir=str(run), config=asdict(config), resume="allow")

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Keep the lines up to `step` and go on after them; the lines that were dropped."""
        rows = read_metrics(self._file.path)
        dropped = [row for row in rows if row["step"] > step]
        if dropped or not self._file.path.exists():
            self._file.replace(row for row in rows if row["step"] <= step)
        return dropped

    def rows(self) -> list[dict[str, Any]]:
        """All lines, of earlier starts too."""
        return read_metrics(self._file.path)

    def write(self, metrics: StepMetrics) -> None:
        self._file.write(metrics.row())
        numbers = {key: value for key, value in metrics.row().items() if value is not None and key not in _NOT_DRAWN}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, metrics.step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=metrics.step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def draw_loss(run_dir: Path) -> None:
    """Draw run_dir/loss.png from the metrics, with validation losses where there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["loss"] is not None]
    if not rows:
        return
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1.2, label="training")
    checked = [row for row in rows if row["validation_loss"] is not None]
    if checked:
        axes.plot(
            [row["step"] for row in checked], [row["validation_loss"] for row in checked], "o-", label="validation"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{rows[-1]['tokens'] / 1e6:,.2f} M tokens, final loss {rows[-1]['loss']:.3f}")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = run_dir / "loss.png.partial"
    figure.savefig(partial, format="png")
    os.replace(partial, run_dir / "loss.png")
