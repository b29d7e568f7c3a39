"""A checkpoint of any layout loads in any other, bitwise: parameters, master weights, both moments."""

import random

import pytest
import torch

from tests.checkpoint.support import Layout, Tables, assemble, load_all, save_trained
from tests.support.pool import Pool

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=3, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=3),
    Layout(data=2, zero=0),
    Layout(data=4, zero=1),
    Layout(pipeline=2, data=2, zero=1),
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(tensor=2, data=2, zero=1),
]

MODELS: dict[str, Tables] = {
    "fp32": {},
    "tied bf16": {
        "model": {"tie_embeddings": True, "qk_norm": True, "attention_bias": True},
        "train": {"precision": "bf16"},
    },
}


def walk(pool: Pool, sections: Tables, layouts: list[Layout], folder: str) -> None:
    saved, run_dirs, seeds = [], [], []
    for number, layout in enumerate(layouts):
        seeds.append(random.randrange(10**6))
        run_dirs.append(f"{folder}/{number}")
        saved.append(assemble(pool.run(save_trained, layout.world, layout, sections, run_dirs[-1], seeds[-1])))
    for target in layouts:
        ranks = pool.run(load_all, target.world, target, sections, run_dirs)
        for number, source in enumerate(layouts):
            loaded = assemble([results[number][2] for results in ranks])
            assert loaded.keys() == saved[number].keys()
            for key, expected in saved[number].items():
                assert torch.equal(loaded[key], expected), f"{key} saved in {source}, loaded in {target}"
            for results in ranks:
                assert results[number][0] == {"step": 2, "seed": seeds[number]}
                assert results[number][1] == 2, "the optimizer's count of updates"


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_loads_in_every_other(pool: Pool, tmp_path, model: str) -> None:
    walk(pool, MODELS[model], LAYOUTS, str(tmp_path))


@pytest.mark.fast
def test_interleaved_stages_load_elsewhere(pool: Pool, tmp_path) -> None:
    layouts = [Layout(pipeline=2, virtual_stages=2), Layout(tensor=2), Layout(data=2)]
    walk(pool, {"model": {"layers": 4}, "train": {"global_batch_size": 4}}, layouts, str(tmp_path))
