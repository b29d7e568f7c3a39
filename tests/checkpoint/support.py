"""What the checkpoint tests share: tiny trainers in any layout, and their state as global tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.manager import CheckpointManager
from megalite.config import Config, build_config
from megalite.data.batch import Batch
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.schedule.schedules import find_schedule
from megalite.train.trainer import Trainer

Tables = dict[str, dict[str, Any]]
Pieces = dict[tuple[str, str], list[tuple[tuple[int, ...], tuple[int, ...], Tensor]]]

SEQUENCE, VOCABULARY = 6, 37


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many ranks hold the model in which way."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    expert: int = 1
    context: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def tables(self) -> Tables:
        """As a recipe says it."""
        return {
            "parallel": {
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "context": self.context,
                "zero": self.zero,
                "sequence": self.sequence,
                "virtual_stages": find_schedule(self.schedule).least_chunks,
                "schedule": self.schedule,
                "expert": self.expert,
            }
        }


def make_config(layout: Layout = Layout(), **sections: dict[str, Any]) -> Config:
    """An odd little model: 3 layers, 6 query and 3 key/value heads, a vocabulary that no tensor size divides."""
    tables: Tables = {
        "model": {
            "layers": 3,
            "hidden_size": 12,
            "ffn_hidden_size": 24,
            "heads": 6,
            "kv_heads": 3,
            "head_dim": 2,
            "vocab_size": VOCABULARY,
            "max_positions": 16,
        },
        "train": {"seq_length": SEQUENCE, "micro_batch_size": 1, "precision": "fp32", "global_batch_size": 4},
        "optimizer": {"eps": 1e-5},
        "checkpoint": {"keep": 0},
        **layout.tables,
    }
    for section, fields in sections.items():
        tables[section] = tables.get(section, {}) | fields
    return build_config(tables)


def make_trainer(config: Config, layout: Layout, rank: int) -> Trainer:
    expert = layout.expert
    mesh = Mesh(pp=layout.pipeline, dp=layout.data // expert, ep=expert, cp=layout.context, tp=layout.tensor, rank=rank)
    trainer = Trainer(config, mesh, select_kernels({"default": "reference"}, mesh.device))
    trainer.initialise()
    return trainer


def train(trainer: Trainer, steps: int, seed: int) -> list[float]:
    """A few steps on random tokens, the same global batches in every layout; the losses."""
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        tokens = torch.randint(0, VOCABULARY, (4, SEQUENCE + 1), generator=generator)
        own = range(trainer.mesh.samples_index, 4, trainer.mesh.samples_size)
        batches = [Batch(tokens[i : i + 1, :-1], tokens[i : i + 1, 1:]) for i in own]
        losses.append(trainer.step(batches, 1e-2).loss)
    return losses


def held(trainer: Trainer) -> Pieces:
    """Everything that this rank holds of global tensors: parameters, master weights and moments."""
    pieces: Pieces = {}

    def enter(kind: str, box: Any, values: Tensor) -> None:
        pieces.setdefault((kind, box.name), []).append((box.shape, box.offset, values.detach().clone()))

    for number, stage in trainer.stages.items():
        with trainer.buckets[number].whole():
            for parameter in stage.parameters():
                for box in parameter.placement.boxes:
                    enter("parameter", box, box.view(parameter))
    for segment in trainer.optimizer.segments:
        for box, where in segment.pieces():
            for kind, values in (("weight", segment.master), *segment.state.items()):
                enter(kind, box, values[where].view(box.size))
    return pieces


def assemble(ranks: list[Pieces]) -> dict[tuple[str, str], Tensor]:
    """The global tensors; every element must be held, and replicas must agree bitwise."""
    whole: dict[tuple[str, str], Tensor] = {}
    known: dict[tuple[str, str], Tensor] = {}
    for pieces in ranks:
        for key, entries in pieces.items():
            for shape, offset, values in entries:
                full = whole.setdefault(key, torch.zeros(shape, dtype=values.dtype))
                seen = known.setdefault(key, torch.zeros(shape, dtype=torch.bool))
                place = tuple(slice(start, start + length) for start, length in zip(offset, values.shape))
                assert torch.equal(full[place][seen[place]], values[seen[place]]), f"replicas of {key} differ"
                full[place], seen[place] = values, True
    for key, seen in known.items():
        assert bool(seen.all()), f"{key} is not held completely"
    return whole


def save_trained(rank: int, layout: Layout, sections: Tables, run_dir: str, seed: int) -> Pieces:
    """Train two steps, save as step 2; what this rank then holds."""
    config = make_config(layout, **sections)
    trainer = make_trainer(config, layout, rank)
    train(trainer, 2, seed)
    with CheckpointManager(run_dir, config, trainer.mesh) as manager:
        manager.save(trainer, {"step": 2, "seed": seed})
        assert manager.wait(), "the checkpoint could not be saved"
    return held(trainer)


def forget(trainer: Trainer) -> None:
    """Fill everything that a checkpoint restores, and the padding, with NaN."""
    for segment in trainer.optimizer.segments:
        segment.bucket.owned.fill_(torch.nan)
        for values in (segment.master.data, *segment.state.values()):
            values.fill_(torch.nan)


def resume(rank: int, layout: Layout, sections: Tables, run: str) -> None:
    """Two steps from the checkpoint end where two steps more in the process that saved it do."""
    ends = []
    config = make_config(layout, **sections)
    for saves in (True, False):
        trainer = make_trainer(config, layout, rank)
        with CheckpointManager(run, config, trainer.mesh) as manager:
            if saves:
                train(trainer, 2, seed=1)
                manager.save(trainer, {"step": 2})
                assert manager.wait()
            else:
                forget(trainer)
                manager.load(trainer, run)
        train(trainer, 2, seed=2)
        ends.append(held(trainer))
    for one, other in zip(*ends, strict=True):
        assert one == other
        for mine, theirs in zip(ends[0][one], ends[1][other], strict=True):
            assert torch.equal(mine[2], theirs[2]), one


def load_all(
    rank: int, layout: Layout, sections: Tables, own_dir: str, run_dirs: list[str]
) -> list[tuple[dict[str, Any], int, Pieces]]:
    """Load every run directory's checkpoint: (state, updates, what this rank then holds) of each."""
    config = make_config(layout, **sections)
    trainer = make_trainer(config, layout, rank)
    results = []
    with CheckpointManager(own_dir, config, trainer.mesh) as manager:
        for run_dir in run_dirs:
            forget(trainer)
            state = manager.load(trainer, run_dir)
            for stage in trainer.buckets.values():
                with stage.whole():
                    assert all(bucket.parameters.isfinite().all() for bucket in stage.buckets), "padding not cleared"
            results.append((state, trainer.optimizer.step_count, held(trainer)))
    return results
