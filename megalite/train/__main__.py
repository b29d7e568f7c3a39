"""`python -m megalite.train RECIPE.toml [--check] [--section.field value ...]`: one rank of a training run."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.config import Config, check, parse_command_line, to_toml
from megalite.errors import FAULT, FINISHED, INTERRUPTED, UNUSABLE, UserError
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.cost import FORMULA, parameter_count
from megalite.observe.events import EventLog
from megalite.observe.observers import Observers
from megalite.observe.watch import Watch
from megalite.runtime import (
    SILENCE_SECONDS,
    StopRequest,
    World,
    choose_device,
    connect,
    explain_fault,
    follow_launcher,
    leave,
    open_log,
)
from megalite.train.inputs import check_inputs, resolve_tokenizer
from megalite.train.loop import Diverged, TrainingRun
from megalite.train.trainer import Trainer

log = logging.getLogger("megalite")


def write_config(config: Config) -> None:
    path = Path(config.run.dir) / "config.toml"
    partial = path.with_suffix(".partial")
    partial.write_text(to_toml(config), encoding="utf-8")
    os.replace(partial, path)


def announce(config: Config, mesh: Mesh, trainer: Trainer, kernels: str) -> None:
    """The start-up log: what is trained, how it is laid out, what computes it."""
    log.info("%s parameters, %s tokens a step", f"{parameter_count(config.model):,}", f"{config.tokens_per_step:,}")
    log.info(
        "%d ranks on %s: tensor %d%s x pipeline %d (%s) x data %d (zero %d), %s, recompute %s",
        mesh.size,
        mesh.device,
        mesh.tp,
        " with sequence" if config.parallel.sequence else "",
        mesh.pp,
        config.parallel.schedule,
        mesh.dp,
        config.parallel.zero,
        config.train.precision,
        config.train.recompute,
    )
    log.info("optimizer: %s; FLOPs: %s", trainer.optimizer.name, FORMULA)
    log.info("kernels: %s", ", ".join(line.removeprefix("kernels.") for line in kernels.splitlines()))
    log.info("TensorBoard: %s", f"{config.run.dir}/tensorboard" if config.log.tensorboard else "off")


def train(config: Config, world: World, stop: StopRequest) -> int:
    """Everything after the command line has been read and checked; returns the exit code."""
    config, eod = resolve_tokenizer(config)
    device = choose_device(config, world)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    open_log(config, world)
    if world.size > 1:
        follow_launcher()
    mesh = connect(config, world, device)
    kernels = select_kernels(dataclasses.asdict(config.kernels), device)
    trainer = Trainer(config, mesh, kernels)
    mesh.warm_up()
    events = EventLog(config.run.dir, world.rank)
    if world.rank == 0:
        write_config(config)
        announce(config, mesh, trainer, kernels.describe())
    events.write_start(world.size)
    with stop.listening(), Watch(mesh, config.run.dir, config.train.timeout_seconds, events).listening() as watch:
        code, observers = FAULT, Observers(config, mesh, events)
        try:
            code = TrainingRun(config, mesh, trainer, stop, watch, observers, eod).run()
            mesh.world.all_reduce(torch.zeros(1, device=device)).wait()  # nobody leaves while another still talks
        except KeyboardInterrupt:
            code = INTERRUPTED
            raise
        except RuntimeError:
            if missing := watch.roll_call(lambda: stop.signal is not None):
                log.error("no answer from rank %s: dead or hung", ", ".join(map(str, missing)))
            raise
        finally:
            observers.event("stop", code=code, signal=stop.signal)
            observers.close()
    if world.size > 1:
        dist.destroy_process_group()
    return code


def main(argv: list[str]) -> int:
    world, stop = World(), StopRequest()
    try:
        world = World.from_environment()
        config, check_only = parse_command_line(argv)
        if check_only:
            if world.rank == 0:
                print(check_inputs(config, world.size))
            return FINISHED
        check(config, world.size)
        return train(config, world, stop)
    except UserError as error:
        # A mistake in the configuration is found by every rank, one found later by several: rank 0 speaks at once, and
        # the launcher then ends the others. Before the ranks have met, some may be seconds behind.
        if world.rank > 0:
            time.sleep(min(5.0, world.rank) if dist.is_initialized() else SILENCE_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return UNUSABLE
    except KeyboardInterrupt:
        if world.rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Diverged as error:
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return FAULT
    except Exception as error:
        explain_fault(error, world, stop)
        return FAULT


if __name__ == "__main__":
    leave(main(sys.argv[1:]), World.from_environment())
