"""The training loop: data in order, steps, validation, checkpoints, metrics, and the ways a run ends."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.manager import CheckpointManager
from megalite.config import Config
from megalite.data.batches import Batch, Batches
from megalite.data.dataset import TokenDataset, build_datasets
from megalite.mesh import Mesh
from megalite.optim.schedule import learning_rate
from megalite.train.metrics import MetricsLog, SpeedMeter, StepMetrics, draw_loss
from megalite.train.progress import ProgressDisplay, describe
from megalite.train.runtime import FINISHED, STOPPED, StopRequest
from megalite.train.trainer import StepResult, Trainer

MAX_REFUSED_STEPS = 5
"""So many steps in a row with a loss or gradient that is not finite end the run."""

log = logging.getLogger("megalite")


class Diverged(Exception):
    """The run cannot go on by itself: too many steps in a row were refused."""


@dataclass
class Position:
    """Where a run stands; saved with every checkpoint. All of it is the same on every rank.

    `step` counts finished steps of the plan, `samples` is the next global sample number, `tokens` those trained on.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_samples: int = 0
    rollbacks: int = 0
    fingerprint: str = ""


def index_folder(config: Config) -> Path:
    """Where sample indices are kept: `data.cache_dir`, else beside the first token file, else in the run directory."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir)
    first = next(entry for entry in config.data.train if not isinstance(entry, int | float))
    prefix = Path(first if isinstance(first, str) else first[-1])
    beside = prefix.parent / "megalite_cache"
    with contextlib.suppress(OSError):
        beside.mkdir(exist_ok=True)
        probe = beside / ".writable"
        probe.touch()
        probe.unlink()
        return beside
    return Path(config.run.dir) / "cache"


def open_data(config: Config) -> tuple[TokenDataset, TokenDataset | None]:
    """The training and validation samples of a run."""
    return build_datasets(
        config.data,
        seq_length=config.train.seq_length,
        seed=config.run.seed,
        train_samples=config.samples_after(config.train.steps),
        valid_samples=config.train.eval_samples if config.train.eval_interval else 0,
        vocab_size=config.model.vocab_size,
        cache_dir=index_folder(config),
    )


class Reader:
    """This rank's micro-batches; ranks in the middle of the pipeline read nothing and get None for each."""

    def __init__(
        self, config: Config, mesh: Mesh, trainer: Trainer, dataset: TokenDataset | None, eod: int | None
    ) -> None:
        self.config = config
        self.per_step = config.train.micro_batch_size * mesh.dp
        self._batches: Batches | None = None
        if dataset is not None and (trainer.needs_batches or config.data.document_mask):
            self._batches = Batches(
                dataset,
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=mesh.index("dp"),
                dp_size=mesh.dp,
                device=mesh.device,
                document_mask=config.data.document_mask,
                end_of_document=eod if config.data.mask_end_of_document else None,
            )

    def read(self, first: int, samples: int) -> list[Batch] | list[None]:
        if self._batches is None:
            return [None] * -(-samples // self.per_step)
        return self._batches.next_batch(first, samples)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


class TrainingRun:
    """One call of `python -m megalite.train`, on one rank: from where the run directory stands to a reason to end."""

    def __init__(self, config: Config, mesh: Mesh, trainer: Trainer, stop: StopRequest, eod: int | None) -> None:
        self.config, self.mesh, self.trainer, self.stop = config, mesh, trainer, stop
        self.last_step = min(config.train.steps, config.train.stop_after or config.train.steps)
        train, valid = open_data(config)
        self.position = Position(fingerprint=train.fingerprint())
        self.train_data = Reader(config, mesh, trainer, train, eod)
        self.valid_data = Reader(config, mesh, trainer, valid, eod)
        self.checkpoints = CheckpointManager(config.run.dir, config, mesh)
        self.meter = SpeedMeter(config, mesh.size, mesh.device)
        self.metrics: MetricsLog | None = None
        self.display: ProgressDisplay | None = None
        self._refused = 0

    def run(self) -> int:
        """Train until the plan's end, `stop_after`, or a signal; returns the exit code."""
        try:
            self._start()
            if self.position.step >= self.last_step:
                log.info("step %d of %d is done already: nothing to do", self.position.step, self.last_step)
                return FINISHED
            return self._train()
        finally:
            self._close()

    def _start(self) -> None:
        """Take up the newest checkpoint, or `checkpoint.load`, or begin with initial weights."""
        state = self.checkpoints.load_latest(self.trainer, fingerprint=self.position.fingerprint)
        source = self.config.checkpoint.load
        if state is not None:
            self._take_up(state)
            log.info("resumed at step %d", self.position.step)
        elif source:
            state = self.checkpoints.load(self.trainer, Path(source), optimizer=self.config.checkpoint.load_optimizer)
            if state:
                self._take_up(state)
            log.info("started from %s at step %d", source, self.position.step)
        else:
            self.trainer.initialise()
            log.info("initial weights from seed %d", self.config.run.seed)
        if self.mesh.rank == 0:
            self.metrics = MetricsLog(self.config, self.position.step)
            self.display = ProgressDisplay(self.position.step, self.last_step, self.config.log.interval)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was made; its data were compared with this run's when it was loaded."""
        self.position = Position(**state | {"fingerprint": self.position.fingerprint})

    def _train(self) -> int:
        for step in range(self.position.step + 1, self.last_step + 1):
            with self._profiled(step):
                started = time.perf_counter()
                result, samples, lr = self._step(step)
                seconds = time.perf_counter() - started
            stopping = result.flags > 0
            evaluate = self.config.train.eval_interval and (
                step % self.config.train.eval_interval == 0 or step == self.last_step
            )
            validation = self._validate() if evaluate and not stopping else None
            last = step == self.last_step or stopping
            interval = self.config.checkpoint.interval
            stall = 0.0
            if last or (interval and step % interval == 0):
                stall = self.checkpoints.save(self.trainer, asdict(self.position))
            self._report(result, samples, lr, seconds, validation, stall)
            if stopping and step < self.last_step:
                self.checkpoints.wait()
                log.info("stopped on request at step %d, with a checkpoint", step)
                return STOPPED
        self.checkpoints.wait()
        log.info("finished at step %d", self.last_step)
        return FINISHED

    def _step(self, step: int) -> tuple[StepResult, int, float]:
        """One step of the plan; returns its result, samples and learning rate."""
        samples = self.config.batch_size_at(self.position.samples)
        lr = learning_rate(step, self.config)
        batches = self.train_data.read(self.position.samples, samples)
        result = self.trainer.step(batches, lr, flag=float(self.stop.signal is not None))
        self.position.step = step
        self.position.samples += samples
        if result.accepted:
            self._refused = 0
            self.position.tokens += samples * self.config.train.seq_length
            return result, samples, lr
        self._refused += 1
        self.position.skipped_samples += samples
        log.warning("step %d refused: loss %s, gradient norm %s", step, result.loss, result.grad_norm)
        if self._refused >= MAX_REFUSED_STEPS:
            raise Diverged(f"loss or gradient was not finite in {self._refused} steps in a row, up to step {step}")
        return result, samples, lr

    def _validate(self) -> float:
        """Mean loss over the first `train.eval_samples` validation samples."""
        loss, tokens = self.trainer.evaluate(self.valid_data.read(0, self.config.train.eval_samples))
        return loss / tokens if tokens else math.nan

    def _report(
        self, result: StepResult, samples: int, lr: float, seconds: float, validation: float | None, stall: float
    ) -> None:
        if self.metrics is None or self.display is None:
            return
        row = StepMetrics(
            step=self.position.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=self.position.tokens,
            step_seconds=seconds,
            memory_gib=self.meter.memory_gib(),
            validation_loss=validation,
            save_stall_seconds=stall,
            skipped_samples=self.position.skipped_samples,
            rollbacks=self.position.rollbacks,
            **self.meter.rates(samples * self.config.train.seq_length, seconds),
        )
        self.metrics.write(row)
        self.display.show(row)
        if row.step % self.config.log.interval == 0:
            log.debug("step %d  %s", row.step, describe(row))

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        """Record the steps `train.profile` = [first, last] with torch's profiler, one Chrome trace a rank and step."""
        window = self.config.train.profile
        if not window or not window[0] <= step <= window[-1]:
            yield
            return
        with torch.profiler.profile(record_shapes=True) as profiler:
            yield
        folder = Path(self.config.run.dir) / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"step_{step:08d}_rank_{self.mesh.rank:05d}.json"))

    def _close(self) -> None:
        self.train_data.close()
        self.valid_data.close()
        if self.display is not None:
            self.display.close()
        if self.metrics is not None:
            self.metrics.close()
            draw_loss(self.metrics.path, Path(self.config.run.dir) / "loss.png")
        self.checkpoints.close()
