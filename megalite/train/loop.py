"""The training loop: data in order, steps, validation, checkpoints, metrics, and the ways a run ends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalite.checkpoint.lock import RunLock
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.restore import planned_samples
from megalite.config import Config
from megalite.errors import FINISHED, STOPPED, Diverged, NotSaved
from megalite.kernels.attention.choice import choose_attention
from megalite.mesh import Mesh
from megalite.observe.events import EventLog, read_events
from megalite.observe.goodput import account, describe_goodput
from megalite.observe.metrics import MetricsLog, SpeedMeter, StepMetrics
from megalite.observe.progress import ProgressDisplay, describe
from megalite.observe.timeline import Recorder
from megalite.observe.watch import Watch
from megalite.optim.schedule import learning_rate
from megalite.runtime import StopRequest
from megalite.train.attention import attention_calls
from megalite.train.inputs import open_data
from megalite.train.profile import Profiler
from megalite.train.reader import Reader
from megalite.train.recovery import SpikeDetector, next_sample, skip_range
from megalite.train.trainer import StepResult, Trainer

MAX_REFUSED_STEPS = 5
"""So many steps in a row with a loss or gradient that is not finite end the run."""

log = logging.getLogger("megalite")


@dataclass
class Position:
    """Where a run stands; saved with every checkpoint. All of it is the same on every rank.

    `step` counts finished steps of the plan, `samples` is the next global sample number, `tokens` those trained on.
    `planned_samples` is what the run was first planned for: the data order of a longer plan begins with it.
    `skips` are the sample ranges [first, stop) to leave out, `losses` the spike detector's window, `attention` the form
    that was chosen for each kind of attention call (empty where the configuration names one).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_samples: int = 0
    rollbacks: int = 0
    planned_samples: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    skips: list[tuple[int, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """A step that was tried: its result, the global batch it took, and what is wrong with it, if anything."""

    result: StepResult
    first: int
    samples: int
    lr: float
    trouble: str = ""


class TrainingRun:
    """One call of `python -m megalite.train`, on one rank: from where the run directory stands to a reason to end."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        trainer: Trainer,
        stop: StopRequest,
        watch: Watch,
        events: EventLog,
        eod: int | None,
        lock: RunLock | None,
        accept: Callable[[], None],
    ) -> None:
        self.config, self.mesh, self.trainer, self.stop, self.watch = config, mesh, trainer, stop, watch
        self.events, self._accept = events, accept
        self.last_step = min(config.train.steps, config.train.stop_after or config.train.steps)
        kept = None if config.checkpoint.allow_data_change else planned_samples(config.run.dir, mesh)
        self.planned = kept or config.samples_after(config.train.steps)
        train, valid = open_data(config, self.planned)
        self.fingerprint = train.fields()
        self.position = Position()
        self.detector = SpikeDetector(config.recovery.spike_threshold)
        self.train_data = Reader(config, mesh, trainer, train, eod)
        self.valid_data = Reader(config, mesh, trainer, valid, eod)
        self.checkpoints = CheckpointManager(config.run.dir, config, mesh, lock)
        self.meter = SpeedMeter(config, mesh.size, mesh.device)
        self.recorder = Recorder(mesh, config.run.dir)
        self.profiler = Profiler(config, mesh, trainer, self.recorder)
        trainer.observe = self.recorder.observe
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
            if self._asked_to_stop():
                log.info("stopped on request at step %d, before another was begun", self.position.step)
                return STOPPED
            return self._train()
        finally:
            self._close()

    def _start(self) -> None:
        """Take up the newest checkpoint, or begin."""
        state = self.checkpoints.load_latest(self.trainer, fingerprint=self.fingerprint)
        if state is not None:
            self._take_up(state)
            log.info("resumed at step %d", self.position.step)
        else:
            self._begin()
        calls, position = attention_calls(self.config), self.position
        position.attention = choose_attention(self.trainer.kernels, calls, self.mesh, position.attention)
        self.checkpoints.accept()
        self._accept()
        if self.mesh.rank == 0:
            self.metrics = MetricsLog(self.config, self.position.step)
            self._rewind_metrics()
            self.display = ProgressDisplay(self.position.step, self.last_step, self.config.log.interval)

    def _begin(self) -> None:
        """Start from `checkpoint.load`, or with initial weights."""
        source = self.config.checkpoint.load
        self._take_up({})
        if not source:
            self.trainer.initialise()
            log.info("initial weights from seed %d", self.config.run.seed)
            return
        state = self.checkpoints.load(self.trainer, Path(source), optimizer=self.config.checkpoint.load_optimizer)
        self._take_up(state)
        log.info("started from %s at step %d", source, self.position.step)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Stand where `state` was saved; its data were compared with this run's when it was loaded."""
        chosen = self.position.attention
        self.position = Position(**state | {"fingerprint": self.fingerprint, "planned_samples": self.planned})
        self.position.attention = chosen or self.position.attention
        self.detector = SpikeDetector(self.config.recovery.spike_threshold, self.position.losses)

    def _train(self) -> int:
        self.events.write("ready", step=self.position.step)
        while self.position.step < self.last_step:
            step = self.position.step + 1
            self.watch.beat()
            self.checkpoints.guard()
            with self.profiler.step(step), self.recorder.step(step):
                started = time.perf_counter()
                outcome = self._step(step)
                seconds = time.perf_counter() - started
            if outcome.trouble:
                self._roll_back(outcome, started)
                continue
            stopping = outcome.result.flags > 0
            every = self.config.train.eval_interval
            evaluate = every and (step % every == 0 or step == self.last_step) and not stopping
            validating = time.perf_counter()
            validation = self._validate() if evaluate else None
            validating = time.perf_counter() - validating
            stopping = stopping or bool(evaluate and self._asked_to_stop())
            interval = self.config.checkpoint.interval
            due = step == self.last_step or stopping or (interval and step % interval == 0)
            stall = self._save() if due else 0.0
            self._report(outcome, seconds, validation, validating, stall)
            self.watch.compare(step, self.recorder.work_seconds)
            if stopping and step < self.last_step:
                return self._saved(STOPPED, f"stopped on request at step {step}, with a checkpoint")
        return self._saved(FINISHED, f"finished at step {self.last_step}")

    def _asked_to_stop(self) -> bool:
        """Whether any rank has been asked to stop; asked by all together, after what takes long and is not a step."""
        return self.stop.agreed(self.mesh)

    def _save(self) -> float:
        """Make a checkpoint; the seconds for which training stood still."""
        failures = self.checkpoints.failures
        stall = self.checkpoints.save(self.trainer, asdict(self.position))
        self._tell_failures(failures)
        return stall

    def _tell_failures(self, before: int) -> None:
        if self.checkpoints.failures > before:
            self.events.write("save_failed", step=self.position.step, why=self.checkpoints.last_failure)

    def _saved(self, code: int, message: str) -> int:
        """End with `code` once the last checkpoint is safe; a fault if it could not be written."""
        failures = self.checkpoints.failures
        saved = self.checkpoints.wait()
        self._tell_failures(failures)
        if not saved:
            raise NotSaved(
                f"the last checkpoint could not be written ({self.checkpoints.last_failure}); "
                f"mend this and start the same command to go on from the one before, in {self.config.run.dir}"
            )
        if self.metrics is not None:
            goodput = account(read_events(Path(self.config.run.dir)), self.metrics.rows(), time.time())
            if goodput is not None:
                log.info("%s", describe_goodput(goodput))
        log.info("%s", message)
        return code

    def _step(self, step: int) -> Outcome:
        """One step of the plan, and whether something is wrong with it."""
        position = self.position
        first = next_sample(position.samples, position.skips)
        position.skipped_samples += first - position.samples
        samples = self.config.batch_size_at(first)
        lr = learning_rate(step, self.config)
        with self.recorder.phase("data"):
            batches = self.train_data.read(first, samples)
        result = self.trainer.step(batches, lr, flag=float(self.stop.signal is not None))
        position.step, position.samples = step, first + samples
        outcome = Outcome(result, first, samples, lr)
        if not result.accepted:
            self._refused += 1
            position.skipped_samples += samples
            log.warning("step %d refused: loss %s, gradient norm %s", step, result.loss, result.grad_norm)
            self.events.write("refused", step=step, loss=str(result.loss), grad_norm=str(result.grad_norm))
            if self._refused >= MAX_REFUSED_STEPS:
                outcome.trouble = f"loss or gradient was not finite in {self._refused} steps in a row"
            return outcome
        self._refused = 0
        position.tokens += samples * self.config.train.seq_length
        if self.detector.is_spike(result.loss):
            outcome.trouble = f"loss {result.loss:.4f} stands out of the recent {len(self.detector.losses)}"
        position.losses = self.detector.losses
        return outcome

    def _roll_back(self, outcome: Outcome, started: float) -> None:
        """Return to a checkpoint `recovery.rollback_steps` back (or the oldest); leave out the data around here.

        `started` is the clock when the step began that is given up.
        """
        recovery, step = self.config.recovery, self.position.step
        rollbacks = self.position.rollbacks + 1
        if rollbacks > recovery.max_rollbacks:
            tried = f" after {rollbacks - 1} rollbacks (recovery.max_rollbacks)" if rollbacks > 1 else ""
            raise Diverged(f"step {step}: {outcome.trouble}{tried}")
        skips = self.position.skips
        saved = self.checkpoints.steps()
        early_enough = [other for other in saved if other <= step - recovery.rollback_steps]
        target = max(early_enough, default=min(saved, default=0))
        state = self.checkpoints.load_latest(self.trainer, fingerprint=self.fingerprint, at_most=target)
        if state is not None:
            self._take_up(state)
        else:
            self._begin()
        self.checkpoints.discard_after(self.position.step)
        skip = skip_range(outcome.first, outcome.samples, recovery.skip_steps, self.position.samples)
        self.position.skips = [*skips, skip]
        self.position.rollbacks, self._refused = rollbacks, 0
        log.warning(
            "step %d: %s; back to step %d, leaving out samples %d to %d (rollback %d of %d)",
            step,
            outcome.trouble,
            self.position.step,
            skip[0],
            skip[1] - 1,
            rollbacks,
            recovery.max_rollbacks,
        )
        self.events.write(
            "rollback",
            step=step,
            to_step=self.position.step,
            why=outcome.trouble,
            samples=[skip[0], skip[1]],
            seconds=round(time.perf_counter() - started, 3),
        )
        self._rewind_metrics()

    def _rewind_metrics(self) -> None:
        """Take back the lines of steps that will be made again; how much time they took remains known."""
        if self.metrics is None:
            return
        dropped = self.metrics.rewind(self.position.step)
        if dropped:
            seconds = sum(row["step_seconds"] + row["save_stall_seconds"] for row in dropped)
            self.events.write(
                "lost",
                to_step=self.position.step,
                steps=len(dropped),
                seconds=round(seconds, 3),
                until=dropped[-1].get("time"),
            )

    def _validate(self) -> float:
        """Mean loss over the first `train.eval_samples` validation samples."""
        loss, tokens = self.trainer.evaluate(self.valid_data.read(0, self.config.train.eval_samples))
        return loss / tokens if tokens else math.nan

    def _report(
        self, outcome: Outcome, seconds: float, validation: float | None, validating: float, stall: float
    ) -> None:
        if self.metrics is None or self.display is None:
            return
        row = StepMetrics(
            step=self.position.step,
            loss=outcome.result.loss,
            grad_norm=outcome.result.grad_norm,
            lr=outcome.lr,
            tokens=self.position.tokens,
            step_seconds=seconds,
            memory_gib=self.meter.memory_gib(),
            validation_loss=validation,
            validation_seconds=validating,
            save_stall_seconds=stall,
            skipped_samples=self.position.skipped_samples,
            rollbacks=self.position.rollbacks,
            **self.meter.rates(outcome.samples * self.config.train.seq_length, seconds),
        )
        self.metrics.write(row)
        self.display.show(row)
        if row.step % self.config.log.interval == 0:
            log.debug("step %d  %s", row.step, describe(row))

    def _close(self) -> None:
        self.train_data.close()
        self.valid_data.close()
        self.recorder.close()
        if self.display is not None:
            self.display.close()
        if self.metrics is not None:
            self.metrics.close()
        self.checkpoints.close()
