"""One rank of one side: `python worker.py ORDER.json`, started by `megalite.compare.sides`.

With `tree` in the order, megalite is imported from another checkout, but for this package, which records the other's
modules as it records its own: the file imports nothing of megalite before that is arranged.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OURS = Path(__file__).resolve().parent


class OtherTree:
    """Finds megalite and its kernels in another checkout, and `megalite.compare` here."""

    def __init__(self, tree: Path) -> None:
        self.folders = {"megalite": tree / "megalite", "megalite.kernels": tree / "kernels", "megalite.compare": OURS}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def main(order_file: str) -> int:
    order = json.loads(Path(order_file).read_text())
    if order["tree"]:
        sys.meta_path.insert(0, OtherTree(Path(order["tree"])))
    from megalite.errors import FAULT, FINISHED, UNUSABLE, RunFailed, UserError
    from megalite.runtime import StopRequest, World, explain_fault, follow_launcher

    world, stop = World.from_environment(), StopRequest()
    follow_launcher(world)
    try:
        record_side(order, world)
        return FINISHED
    except (UserError, RunFailed) as error:
        (Path(order["folder"]) / f"refused_{world.rank}").write_text(str(error))
        return UNUSABLE if isinstance(error, UserError) else FAULT
    except Exception as error:
        explain_fault(error, world, stop)
        return FAULT


def record_side(order: dict[str, Any], world: Any) -> None:
    """Make the steps and write this rank's recording."""
    import os

    import torch
    import torch.distributed as dist

    from megalite.checkpoint.manager import CheckpointManager
    from megalite.checkpoint.peers import Peers
    from megalite.compare.pieces import Sampling, write_pieces
    from megalite.compare.record import Recorder
    from megalite.compare.rounding import Rounding
    from megalite.config import check, load_config
    from megalite.kernels import select_kernels
    from megalite.kernels.attention.choice import choose_attention
    from megalite.optim import lr_schedule
    from megalite.runtime import choose_device, connect
    from megalite.train.attention_calls import attention_calls
    from megalite.train.inputs import open_data, resolve_tokenizer
    from megalite.train.start import build_task

    folder = Path(order["folder"])
    config = load_config(order["recipe"], order["overrides"])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder / "run")))
    check(config, world.size)
    config, eod = resolve_tokenizer(config)
    device = choose_device(config, world)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    mesh = connect(config, world, device)
    kernels = select_kernels(dataclasses.asdict(config.kernels), device, deterministic=config.train.deterministic)
    task = build_task(config, mesh, kernels)
    mesh.warm_up()
    train, _ = open_data(config)
    task.open(train, None, eod)
    checkpoints = CheckpointManager(config.run.dir, config, mesh, None, Peers(mesh))
    state = task.begin(checkpoints)
    task.prepare(state.get("task", {}))
    choose_attention(kernels, attention_calls(config), mesh, state.get("attention", {}))
    rounding = Rounding(**order["rounding"]) if order["rounding"] else None
    recorder = Recorder(task.trainer, Sampling(**order["sampling"]), rounding)
    recorder.start()
    done, first = int(state.get("step", 0)), int(state.get("samples", 0))
    for step in range(1, order["steps"] + 1):
        samples = config.samples_at(first)
        lr = lr_schedule.learning_rate(done + step, config)
        with recorder.step(step, samples, lr) as finished:
            result, _work = task.step(first, samples, lr, lambda: 0.0)
            finished(result)
        first += samples
    task.close()
    checkpoints.close()
    write_pieces(folder / f"rank_{world.rank:05d}", recorder.pieces)
    mesh.world.all_reduce(torch.zeros(1, device=mesh.device)).wait()  # no rank leaves while another communicates
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    code = main(sys.argv[1])
    from megalite.runtime import leave

    leave(code)
