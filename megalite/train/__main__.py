"""`python -m megalite.train RECIPE.toml [--check] [--section.field value ...]`: one rank of a training run.

Signal handlers are installed before anything else is imported. Then, in this order: check, lock the run directory, load
or initialise, write. A start that is refused changes nothing on disk.
"""

from __future__ import annotations

import sys

from megalite.errors import FAULT, FINISHED, INTERRUPTED, STOPPED, UNUSABLE, RunFailed, UserError
from megalite.runtime import SILENCE_SECONDS, StoppedEarly, StopRequest, World, explain_fault, follow_launcher, leave


def start(argv: list[str], world: World, stop: StopRequest) -> int:
    """Check the command line, take the run directory and train; returns the exit code."""
    with stop.at_once(world):
        from megalite.checkpoint.lock import RunLock
        from megalite.config import check, parse_command_line
        from megalite.observe.trackers import require_credentials
        from megalite.registry import import_beside
        from megalite.train.inputs import check_inputs, resolve_tokenizer

        command = parse_command_line(argv)
        if command.recipe and command.config.rollout.reward:
            import_beside(command.recipe, command.config.rollout.reward)
        if command.check_only:
            if world.rank == 0:
                print(check_inputs(command.config, world.size))
            return FINISHED
        check(command.config, world.size)
        require_credentials(command.config)
        config, eod = resolve_tokenizer(command.config)
    lock = RunLock(config.run.dir) if world.rank == 0 else None
    try:
        with stop.at_once(world, lambda: lock.release() if lock else None):
            # Imported late: torch takes seconds, and a directory in use is refused without that delay.
            from megalite.train.start import Start

        return Start(config, command.recipe, world, stop, lock).run(eod)
    finally:
        if lock is not None:
            lock.release()


def main(argv: list[str]) -> int:
    world, stop = World(), StopRequest()
    with stop.listening():
        try:
            world = World.from_environment()
            follow_launcher(world)
            return start(argv, world, stop)
        except UserError as error:
            if first_to_report(world, stop):
                print(f"error: {error}", file=sys.stderr, flush=True)
            return UNUSABLE
        except StoppedEarly:
            return STOPPED
        except KeyboardInterrupt as error:
            if world.rank == 0:
                print(": ".join(["interrupted", *map(str, error.args)]), file=sys.stderr, flush=True)
            return INTERRUPTED
        except RunFailed as error:
            if world.rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            return FAULT
        except Exception as error:
            explain_fault(error, world, stop)
            return FAULT


def first_to_report(world: World, stop: StopRequest) -> bool:
    """Whether this rank should report a user error, which usually several ranks find.

    Rank 0 reports at once, and the launcher then ends the others. Before the process group exists, other ranks wait,
    since rank 0 may be seconds behind; afterwards the job's store records whether a rank has reported.
    """
    if world.size == 1:
        return True
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return world.rank == 0 or not stop.wait(SILENCE_SECONDS)
    if world.rank > 0 and stop.wait(min(5.0, world.rank)):
        return False
    try:
        return bool(dist.distributed_c10d._get_default_store().add("megalite/refusal", 1) == 1)
    except (RuntimeError, OSError):  # the store died with the rank that has reported
        return world.rank == 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
