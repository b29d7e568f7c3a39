"""A checkpoint of any layout loads in any other, bitwise: parameters, master weights, both moments."""

import random
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.manager import CheckpointManager
from tests.checkpoint.support import (
    Layout,
    Tables,
    assemble,
    forget,
    held,
    load_all,
    make_config,
    make_trainer,
    save_trained,
    train,
)
from tests.support.pool import Pool

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=3, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=3),
    Layout(data=2, zero=0),
    Layout(data=4, zero=3),
    Layout(pipeline=2, data=2, zero=1),
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(tensor=2, data=2, zero=2),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(context=2, data=2, zero=3),
]


def walk(pool: Pool, sections: Tables, layouts: list[Layout], folder: str) -> None:
    saved, run_dirs, seeds = [], [], []
    for number, layout in enumerate(layouts):
        seeds.append(random.randrange(10**6))
        run_dirs.append(f"{folder}/{number}")
        saved.append(assemble(pool.run(save_trained, layout.world, layout, sections, run_dirs[-1], seeds[-1])))
    for target in layouts:
        ranks = pool.run(load_all, target.world, target, sections, f"{folder}/loading", run_dirs)
        for number, source in enumerate(layouts):
            loaded = assemble([results[number][2] for results in ranks])
            assert loaded.keys() == saved[number].keys()
            for key, expected in saved[number].items():
                assert torch.equal(loaded[key], expected), f"{key} saved in {source}, loaded in {target}"
            for results in ranks:
                assert results[number][0] == {"step": 2, "seed": seeds[number]}
                assert results[number][1] == 2, "the optimizer's count of updates"


def test_every_layout_loads_in_every_other(pool: Pool, tmp_path: Path) -> None:
    walk(pool, {}, LAYOUTS, str(tmp_path))


def test_bf16_parameters_and_tied_embeddings(pool: Pool, tmp_path: Path) -> None:
    sections: Tables = {
        "model": {"tie_embeddings": True, "qk_norm": True, "attention_bias": True},
        "train": {"precision": "bf16"},
    }
    layouts = [
        Layout(),
        Layout(pipeline=2, data=2, zero=3, schedule="zb_v"),
        Layout(tensor=2, pipeline=2, sequence=True),
        Layout(tensor=2, data=2, zero=0),
        Layout(tensor=3),
    ]
    walk(pool, sections, layouts, str(tmp_path))


@pytest.mark.fast
def test_interleaved_stages_load_elsewhere(pool: Pool, tmp_path: Path) -> None:
    layouts = [Layout(pipeline=2, schedule="interleaved"), Layout(tensor=2), Layout(data=2)]
    walk(pool, {"model": {"layers": 4}, "train": {"global_batch_size": 4}}, layouts, str(tmp_path))


@pytest.mark.fast
def test_experts_load_wherever_they_are(pool: Pool, tmp_path: Path) -> None:
    """Experts, the routers' biases and the loads they remember, among layouts that split experts or do not."""
    sections: Tables = {
        "model": {
            "experts": 6,
            "expert_ffn_hidden_size": 12,
            "shared_experts": 1,
            "router": "sigmoid",
            "router_bias_rate": 0.1,
            "aux_loss": 0.01,
            "aux_loss_scope": "batch",
        },
        "train": {"precision": "bf16"},
    }
    layouts = [
        Layout(),
        Layout(data=2, expert=2, zero=3),
        Layout(tensor=2, sequence=True, data=2, expert=2, zero=0),
        Layout(pipeline=2, data=2, zero=2),
    ]
    walk(pool, sections, layouts, str(tmp_path))


def resumed(rank: int, layout: Layout, run_dir: str) -> tuple[list[float], list[float], bool]:
    """Losses of four steps on end, of the last two after a load, and whether both ended with the same state."""
    config = make_config(layout)
    first, second = (make_trainer(config, layout, rank) for _ in range(2))
    train(first, 2, 1)
    with CheckpointManager(run_dir, config, first.mesh) as manager:
        manager.save(first, {"step": 2})
        on_end = train(first, 2, 2)
        forget(second)
        assert manager.load_latest(second) == {"step": 2}
    after = train(second, 2, 2)
    one, other = held(first), held(second)
    same = all(torch.equal(a[2], b[2]) for key in one for a, b in zip(one[key], other[key], strict=True))
    return on_end, after, same


@pytest.mark.parametrize("layout", [Layout(tensor=2, pipeline=2, sequence=True), Layout(pipeline=2, data=2)])
def test_training_goes_on_bitwise_in_the_same_layout(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    for on_end, after, same in pool.run(resumed, layout.world, layout, str(tmp_path)):
        assert after == on_end
        assert same


def losses_after_load(rank: int, layout: Layout, own_dir: str, run_dir: str) -> list[float]:
    config = make_config(layout)
    trainer = make_trainer(config, layout, rank)
    with CheckpointManager(own_dir, config, trainer.mesh) as manager:
        manager.load(trainer, run_dir)
    return train(trainer, 3, 7)


def test_training_goes_on_alike_in_other_layouts(pool: Pool, tmp_path: Path) -> None:
    source, run_dir = Layout(tensor=3, sequence=True), str(tmp_path / "saved")
    pool.run(save_trained, source.world, source, {}, run_dir, 3)
    layouts = [source, Layout(), Layout(pipeline=2, data=2), Layout(tensor=2, context=2)]
    curves = [pool.run(losses_after_load, one.world, one, str(tmp_path / "own"), run_dir)[0] for one in layouts]
    for curve in curves[1:]:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=1e-5, atol=0)
