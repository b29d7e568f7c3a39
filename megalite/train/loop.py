"""The training loop: data, steps, validation, checkpoints, metrics, rollbacks, and the ways a run ends."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megalite.checkpoint.lock import RunLock
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.peers import Peers
from megalite.checkpoint.restore import planned_samples
from megalite.config import Config
from megalite.errors import FINISHED, STOPPED, CommonError, Diverged, NotSaved, RunFailed
from megalite.evaluation.during_training import Answers
from megalite.kernels.attention.choice import choose_attention
from megalite.mesh import Mesh
from megalite.objective.work import Work
from megalite.observe.formatting import counted
from megalite.observe.metrics import SpeedMeter, StepMetrics
from megalite.observe.observers import Observers
from megalite.observe.watch import Watch
from megalite.optim.lr_schedule import learning_rate
from megalite.runtime import StopRequest
from megalite.train.attention_calls import attention_calls
from megalite.train.inputs import open_data
from megalite.train.integrity import Integrity
from megalite.train.profile import Profiler
from megalite.train.recovery import SpikeDetector, next_sample, skip_range, unearned
from megalite.train.task import Task
from megalite.train.trainer import Damaged, StepResult

MAX_REFUSED_STEPS = 5
"""Consecutive steps with a non-finite loss or gradient before the run rolls back or ends."""

log = logging.getLogger("megalite")


@dataclass
class RunState:
    """The loop's state, saved with every checkpoint; identical on every rank.

    `step` counts finished steps of the plan, `samples` is the next global sample number, `tokens` counts tokens trained
    on. `planned_samples` is the number the run was first planned for: the data order of a longer plan begins with it.
    `skips` are the sample ranges [first, stop) to leave out, `losses` and `lr` the spike detector's state. `rollbacks`
    counts all rollbacks, `rolled_back_at` holds the steps of those not yet earned back. `attention` is the form chosen
    for each kind of attention call (empty if the configuration names one). `objective` is what was trained for, `task`
    the task's own state.
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
    lr: float = 0.0
    rolled_back_at: list[int] = field(default_factory=list)
    objective: str = "next_token"
    task: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """A step that was tried: its result, its global batch, and in `failure` the reason to roll back, if any.

    `loss` is nan if the batch held nothing to learn.
    """

    result: StepResult
    work: Work
    first: int
    samples: int
    lr: float
    loss: float
    failure: str = ""


class TrainingRun:
    """One call of `python -m megalite.train`, on one rank: resume or begin, then train to a reason to end."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        task: Task,
        stop: StopRequest,
        watch: Watch,
        observers: Observers,
        eod: int | None,
        lock: RunLock | None,
        accept: Callable[[], None],
    ) -> None:
        self.config, self.mesh, self.task, self.stop, self.watch = config, mesh, task, stop, watch
        self.observers, self._accept = observers, accept
        self.last_step = min(config.train.steps, config.train.stop_after or config.train.steps)
        peers = Peers(mesh)
        kept = None if config.checkpoint.allow_data_change else planned_samples(config.run.dir, peers)
        self.planned = kept or config.samples_after(config.train.steps)
        train, valid = open_data(config, self.planned)
        self.fingerprint = train.fields()
        self.state = RunState()
        self.detector = SpikeDetector(config.recovery.spike_threshold)
        task.open(train, valid, eod)
        self.answers = Answers(config, task.trainer) if config.eval.interval else None
        self.checkpoints = CheckpointManager(config.run.dir, config, mesh, lock, peers)
        self.meter = SpeedMeter(mesh.size, mesh.device)
        observers.wrap_steps("profiler", lambda: Profiler(config, mesh, task.trainer, observers.recorder).step)
        task.observe(observers.recorder)
        interval = config.recovery.replica_check_interval
        self.integrity = Integrity(task.saved.models, mesh, interval, observers.event)
        self._refused = 0
        self._recent: deque[int] = deque(maxlen=MAX_REFUSED_STEPS)
        """First samples of the latest steps: a spike is detected some steps after it began."""

    def run(self) -> int:
        """Train until the plan's end, `stop_after`, or a signal; returns the exit code."""
        try:
            self._start()
            if self.state.step >= self.last_step:
                log.info("step %d of %d is done already: nothing to do", self.state.step, self.last_step)
                return FINISHED
            if self._asked_to_stop():
                log.info("stopped on request at step %d, before another was begun", self.state.step)
                return STOPPED
            return self._train()
        finally:
            self._close()

    def _start(self) -> None:
        """Resume from the newest checkpoint, or begin."""
        state = self.checkpoints.load_latest(self.task.saved, fingerprint=self.fingerprint)
        if state is not None:
            self._take_up(state)
            log.info("resumed at step %d", self.state.step)
        else:
            self._begin()
        calls = attention_calls(self.config)
        self.state.attention = choose_attention(self.task.trainer.kernels, calls, self.mesh, self.state.attention)
        self.checkpoints.accept()
        self._accept()
        self.observers.begin(self.state.step, self.last_step)

    def _begin(self) -> None:
        """Start from `checkpoint.load`, or with initial weights."""
        source = self.config.checkpoint.load
        self._take_up(self.task.begin(self.checkpoints))
        if source:
            log.info("started from %s at step %d", source, self.state.step)
        else:
            log.info("initial weights from seed %d", self.config.run.seed)

    def _take_up(self, state: dict[str, Any]) -> None:
        """Continue from a saved `state`; empty for a new run. It was compared with this run when it was loaded."""
        chosen = self.state.attention
        own = {"planned_samples": self.planned, "objective": self.config.objective.kind}
        self.state = RunState(**state | {"fingerprint": self.fingerprint, **own})
        self.state.attention = chosen or self.state.attention
        self.detector = SpikeDetector(self.config.recovery.spike_threshold, self.state.losses, self.state.lr)
        self.task.prepare(self.state.task)
        self.integrity.sound = self.state.step

    def _train(self) -> int:
        self.observers.event("ready", step=self.state.step)
        while self.state.step < self.last_step:
            step = self.state.step + 1
            self.watch.beat()
            self.checkpoints.guard()
            with self.observers.step(step):
                started = time.perf_counter()
                try:
                    outcome = self._step(step)
                except Damaged as damage:
                    self._make_again(step, self.integrity.report(step, damage), step - 1, started)
                    continue
                except CommonError:
                    self._save_before_the_end()
                    raise
                seconds = time.perf_counter() - started
            if outcome.failure:
                self._roll_back(outcome, started)
                continue
            stopping = outcome.result.flags > 0
            every = self.config.train.eval_interval
            evaluate = every and (step % every == 0 or step == self.last_step) and not stopping
            validating = time.perf_counter()
            validation = self._validate() if evaluate else None
            answers = self._measure_answers(step) if not stopping else {}
            validating = time.perf_counter() - validating
            stopping = stopping or bool((evaluate or answers) and self._asked_to_stop())
            interval = self.config.checkpoint.interval
            due = step == self.last_step or stopping or bool(interval and step % interval == 0)
            if differs := self._find_damage(step, due):
                self._make_again(step, differs, self.integrity.sound, started)
                continue
            stall = self._save() if due else 0.0
            self._report(outcome, seconds, validation, answers, validating, stall)
            self.watch.compare(step, self.observers.recorder.work_seconds)
            if stopping and step < self.last_step:
                return self._saved(STOPPED, f"stopped on request at step {step}, with a checkpoint")
        return self._saved(FINISHED, f"finished at step {self.last_step}")

    def _asked_to_stop(self) -> bool:
        """Whether any rank has been asked to stop. Collective; called after long work outside of steps."""
        return self.stop.agreed(self.mesh)

    def _save(self) -> float:
        """Save a checkpoint; returns the seconds that training was stalled."""
        failures = self.checkpoints.failures
        self.state.task = self.task.state()
        stall = self.checkpoints.save(self.task.saved, asdict(self.state))
        self._tell_failures(failures)
        return stall

    def _save_before_the_end(self) -> None:
        """After an error on all ranks that came before anything of the step was updated: no finished step is lost."""
        self.checkpoints.wait()
        if self.state.step > 0 and self.state.step not in self.checkpoints.steps():
            self._save()
            self.checkpoints.wait()

    def _tell_failures(self, before: int) -> None:
        if self.checkpoints.failures > before:
            self.observers.event("save_failed", step=self.state.step, why=self.checkpoints.last_failure)

    def _saved(self, code: int, message: str) -> int:
        """Return `code` once the last checkpoint is on disk; raises if it could not be written."""
        failures = self.checkpoints.failures
        saved = self.checkpoints.wait()
        self._tell_failures(failures)
        if not saved:
            raise NotSaved(
                f"the last checkpoint could not be written ({self.checkpoints.last_failure}); "
                f"mend this and start the same command to go on from the one before, in {self.config.run.dir}"
            )
        self.observers.tell_goodput()
        log.info("%s", message)
        return code

    def _step(self, step: int) -> Outcome:
        """One step of the plan."""
        state = self.state
        first = next_sample(state.samples, state.skips)
        samples = self.config.samples_at(first)
        lr = learning_rate(step, self.config)
        result, work = self.task.step(first, samples, lr, lambda: float(self.stop.signal is not None))
        state.skipped_samples += first - state.samples
        state.step, state.samples = step, first + samples
        outcome = Outcome(result, work, first, samples, lr, result.loss)
        self._recent.append(first)
        if not result.accepted:
            self._refuse(outcome)
            return outcome
        self._refused = 0
        if result.units == 0:
            outcome.loss = math.nan
            log.warning("step %d: nothing to learn in samples %d to %d", step, first, first + samples - 1)
            self.observers.event("empty", step=step, samples=[first, first + samples])
            return outcome
        state.tokens += work.tokens
        if lasted := self.detector.spike_steps(result.loss, lr):
            outcome.failure = f"loss {result.loss:.4f} is far above the recent {len(self.detector.losses)}"
            outcome.first = list(self._recent)[-lasted:][0]
        state.losses, state.lr = self.detector.losses, self.detector.lr
        return outcome

    def _refuse(self, outcome: Outcome) -> None:
        """Handle a non-finite loss or gradient: nothing was updated, and the data count as skipped."""
        result, step = outcome.result, self.state.step
        self._refused += 1
        self.state.skipped_samples += outcome.samples
        log.warning("step %d refused: loss %s, gradient norm %s", step, result.loss, result.grad_norm)
        self.observers.event("refused", step=step, loss=str(result.loss), grad_norm=str(result.grad_norm))
        if self._refused >= MAX_REFUSED_STEPS:
            outcome.failure = f"loss or gradient was not finite in {self._refused} steps in a row"

    def _roll_back(self, outcome: Outcome, started: float) -> None:
        """Return to a checkpoint `recovery.rollback_steps` back (or the oldest); skip the data around the failure.

        `started` is the time (`perf_counter`) at which the failed step began.
        """
        recovery, state = self.config.recovery, self.state
        step, read, skips, rollbacks = state.step, state.samples, state.skips, state.rollbacks + 1
        counting = [*unearned(state.rolled_back_at, step, recovery.rollback_steps), step]
        if len(counting) > recovery.max_rollbacks:
            tried = counted(len(counting) - 1, "rollback")
            tried = f" after {tried} not earned back (recovery.max_rollbacks)" if len(counting) > 1 else ""
            raise Diverged(f"step {step}: {outcome.failure}{tried}")
        saved = self.checkpoints.steps()
        early_enough = [other for other in saved if other <= step - recovery.rollback_steps]
        target = max(early_enough, default=min(saved, default=0))
        self._return_to(target)
        first, stop = skip_range(outcome.first, outcome.samples, recovery.skip_steps, self.state.samples, read)
        self.state.skips = [*skips, (first, stop)]
        self.state.rollbacks, self.state.rolled_back_at, self._refused = rollbacks, counting, 0
        log.warning(
            "step %d: %s; back to step %d, leaving out samples %d to %d (rollback %d of %d)",
            step,
            outcome.failure,
            self.state.step,
            first,
            stop - 1,
            len(counting),
            recovery.max_rollbacks,
        )
        facts = {"step": step, "to_step": self.state.step, "why": outcome.failure, "samples": [first, stop]}
        self.observers.event("rollback", **facts, seconds=round(time.perf_counter() - started, 3))
        self.observers.rewind(self.state.step)

    def _find_damage(self, step: int, saving: bool) -> str:
        """What is not as it must be after `step`; empty if nothing, or if no check is due."""
        if not self.integrity.due(step, saving):
            return ""
        try:
            return self.integrity.check(step)
        except Damaged as damage:
            return self.integrity.report(step, damage)

    def _make_again(self, step: int, why: str, at_most: int, started: float) -> None:
        """Return to the newest checkpoint up to step `at_most`, and lose no data: the same steps follow again."""
        recovery, state = self.config.recovery, self.state
        counting = [*unearned(state.rolled_back_at, step, recovery.rollback_steps), step]
        if len(counting) > recovery.max_rollbacks:
            raise RunFailed(f"step {step}: {why}; this was rollback {len(counting)} (recovery.max_rollbacks)")
        self._return_to(at_most)
        self.state.skips, self.state.rollbacks, self.state.rolled_back_at = state.skips, state.rollbacks + 1, counting
        log.warning("step %d: back to step %d, to make the same steps again", step, self.state.step)
        seconds = round(time.perf_counter() - started, 3)
        self.observers.event("rollback", step=step, to_step=self.state.step, why=why, seconds=seconds)
        self.observers.rewind(self.state.step)

    def _return_to(self, at_most: int) -> None:
        """Take up the newest checkpoint up to a step, or begin again if there is none; discard the later ones."""
        loaded = self.checkpoints.load_latest(self.task.saved, fingerprint=self.fingerprint, at_most=at_most)
        if loaded is not None:
            self._take_up(loaded)
        else:
            self._begin()
        self.checkpoints.discard_after(self.state.step)

    def _validate(self) -> tuple[float, Mapping[str, float]]:
        """The task's loss and further metrics on the validation data; nan if nothing of it counts."""
        loss, metrics = self.task.validate()
        if math.isnan(loss) and not metrics:
            log.warning("step %d: no token of the validation samples counts, so there is no loss", self.state.step)
        return loss, metrics

    def _measure_answers(self, step: int) -> Mapping[str, float]:
        """The metrics of `eval.tasks`; none where they are not due."""
        if self.answers is None or not self.answers.due(step, step == self.last_step):
            return {}
        return self.answers.measure()

    def _report(
        self,
        outcome: Outcome,
        seconds: float,
        validation: tuple[float, Mapping[str, float]] | None,
        answers: Mapping[str, float],
        validating: float,
        stall: float,
    ) -> None:
        loss, further = validation or (None, {})
        self.observers.report(
            StepMetrics(
                step=self.state.step,
                loss=outcome.loss,
                grad_norm=outcome.result.grad_norm,
                lr=outcome.lr,
                tokens=self.state.tokens,
                step_seconds=seconds,
                memory_gib=self.meter.memory_gib(),
                validation_loss=loss,
                validation_seconds=validating,
                optimizer_seconds=self.observers.recorder.optimizer_seconds,
                save_stall_seconds=stall,
                skipped_samples=self.state.skipped_samples,
                rollbacks=self.state.rollbacks,
                extra=outcome.result.metrics | {"units": outcome.result.units} | dict(further) | dict(answers),
                **self.meter.rates(outcome.work.tokens, outcome.work.flops, seconds),
            )
        )

    def _close(self) -> None:
        """Close everything even if one of them fails; the first error is the one raised."""
        with contextlib.ExitStack() as stack:
            for close in (self.checkpoints.close, self.task.close):
                stack.callback(close)
            self.observers.close_display()
