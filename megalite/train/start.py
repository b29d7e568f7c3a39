"""One start of a run, on one rank: process group, model, training loop, shutdown.

The run directory is already locked. Nothing is written into it before `accept`, which the loop calls once the
checkpoint has been loaded or the weights have been initialised.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.checkpoint.directory import CHECKPOINTS, complete_checkpoints
from megalite.checkpoint.lock import RunLock
from megalite.config import Config, to_toml
from megalite.errors import FAULT, INTERRUPTED, STOPPED, UNUSABLE, UserError
from megalite.files import write_atomically
from megalite.kernels import Kernels, select_kernels
from megalite.mesh import Mesh
from megalite.model.cost import FORMULA, FORMULA_ADAPTER, model_sizes, parameter_count
from megalite.observe.events import EventLog
from megalite.observe.observers import Observers
from megalite.observe.watch import Watch
from megalite.runtime import RunLog, StopRequest, World, choose_device, connect
from megalite.train.loop import TrainingRun
from megalite.train.task import GradientTask, Task
from megalite.train.trainer import Trainer

log = logging.getLogger("megalite")


def write_config(config: Config, recipe: str | None) -> None:
    """Write run.dir/config.toml, unless it is the recipe of this start: the author's file is not overwritten."""
    path = Path(config.run.dir) / "config.toml"
    if recipe and path.exists() and path.samefile(recipe):
        log.info("%s is the recipe of this start and stays as it is; checkpoints keep the configuration in use", path)
        return
    try:
        write_atomically(path, to_toml(config))
    except OSError as error:
        log.warning("%s cannot be written (%s); training goes on", path, error.strerror)


def announce(config: Config, mesh: Mesh, trainer: Trainer, kernels: str) -> None:
    """The start-up log: what is trained, how it is laid out, what computes it."""
    log.info("%s parameters, %s tokens a step", f"{parameter_count(config.model):,}", f"{config.tokens_per_step:,}")
    if trainer.adapter is not None:
        trained = model_sizes(config.model, adapter=config.adapter).adapter_parameters(config.model)
        log.info("%s: %s parameters are trained, all others are frozen", config.adapter.kind, f"{trained:,}")
    splits = config.parallel.overlap_splits(gpu=mesh.device.type == "cuda")
    sequence = f" with sequence{f' in {splits} pieces' if splits > 1 else ''}"
    log.info(
        "%d ranks on %s: tensor %d%s x pipeline %d (%s) x context %d%s x data %d (zero %d%s), %s, recompute %s",
        mesh.size,
        mesh.device,
        mesh.tp,
        sequence if config.parallel.sequence else "",
        mesh.pp,
        config.parallel.schedule,
        mesh.cp,
        f" ({config.parallel.context_mode})" if mesh.cp > 1 else "",
        mesh.samples_size,
        config.parallel.zero,
        f", experts split over {mesh.ep}" if mesh.ep > 1 else "",
        config.train.precision,
        config.train.recompute,
    )
    formula = FORMULA if trainer.adapter is None else FORMULA_ADAPTER
    log.info("optimizer: %s; FLOPs: %s", trainer.optimizer.name, formula)
    log.info("kernels: %s", ", ".join(line.removeprefix("kernels.") for line in kernels.splitlines()))
    log.info("TensorBoard: %s", f"{config.run.dir}/tensorboard" if config.log.tensorboard else "off")


def build_task(config: Config, mesh: Mesh, kernels: Kernels) -> Task:
    """The task of `objective.kind`."""
    if config.objective.kind == "dpo":
        from megalite.train.preference_task import PreferenceTask

        return PreferenceTask(config, mesh, kernels)
    if config.objective.data_format == "prompt":
        from megalite.train.policy_task import PolicyTask  # loads Jinja

        return PolicyTask(config, mesh, kernels)
    return GradientTask(config, mesh, kernels)


def what_is_kept(config: Config) -> str:
    """The message after Ctrl-C: where the run can resume, and how to stop it without losing steps."""
    saved = complete_checkpoints(Path(config.run.dir) / CHECKPOINTS)
    kept = f"the newest checkpoint is {saved[-1][1]}" if saved else f"{config.run.dir} holds no checkpoint yet"
    go_on = "go on from it" if saved else "begin anew"
    return f"{kept}, start the same command to {go_on}; to stop with a checkpoint, send SIGTERM (kill PID), not Ctrl-C"


class Start:
    """One start of a run on one rank; rank 0 holds the lock."""

    def __init__(
        self, config: Config, recipe: str | None, world: World, stop: StopRequest, lock: RunLock | None
    ) -> None:
        self.config, self.recipe, self.world, self.stop, self.lock = config, recipe, world, stop, lock
        self.accepted = False
        self.log = RunLog(config, world)
        self.events = EventLog(config.run.dir, world.rank)

    def accept(self) -> None:
        """Allow writes to the run directory from here on."""
        self.accepted = True
        self.log.keep()
        if self.world.rank == 0:
            write_config(self.config, self.recipe)
        self.events.write_start(self.world.size)

    def run(self, eod: int | None) -> int:
        """Run to the end; returns the exit code."""
        try:
            code = self._run(eod)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(what_is_kept(self.config)) from None
        except RuntimeError:
            # Peers that were asked to stop before all ranks had connected have already left.
            if self.stop.signal is None or self.accepted:
                raise
            return STOPPED
        if self.world.size > 1:
            dist.destroy_process_group()
        return code

    def _run(self, eod: int | None) -> int:
        """Connect to the other ranks, build the model and train."""
        with self.stop.at_once(self.world, self.lock.release if self.lock else lambda: None):
            device = choose_device(self.config, self.world)
            deterministic = self.config.train.deterministic or bool(self.config.train.invariant)
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            if self.config.train.invariant and device.type == "cpu":
                torch.set_num_threads(1)  # a product's order of summation may depend on it, and it on the layout
            mesh = connect(self.config, self.world, device)
            asked = self.stop.agreed(mesh)
        if asked:
            log.info("stopped on request before training began")
            return STOPPED
        kernels = select_kernels(dataclasses.asdict(self.config.kernels), device, deterministic=deterministic)
        task = build_task(self.config, mesh, kernels)
        mesh.warm_up()
        if self.world.rank == 0:
            announce(self.config, mesh, task.trainer, kernels.describe())
        with Watch(mesh, self.config.run.dir, self.config.train.timeout_seconds, self.events).listening() as watch:
            return self._train(mesh, task, watch, eod)

    def _train(self, mesh: Mesh, task: Task, watch: Watch, eod: int | None) -> int:
        code, observers = FAULT, Observers(self.config, mesh, self.events)
        try:
            code = TrainingRun(self.config, mesh, task, self.stop, watch, observers, eod, self.lock, self.accept).run()
            # No rank leaves while another still communicates.
            mesh.world.all_reduce(torch.zeros(1, device=mesh.device)).wait()
            return code
        except KeyboardInterrupt:
            code = INTERRUPTED
            raise
        except UserError:
            code = UNUSABLE
            raise
        except RuntimeError:
            watch.roll_call.after_failure(lambda: self.stop.signal is not None)
            raise
        finally:
            if self.accepted:
                observers.event("stop", code=code, signal=self.stop.signal)
            observers.close()
