"""Bits per byte of right answers during training: the definition, in every layout, in the metrics of a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.config import Config, build_config
from megalite.errors import UserError
from megalite.evaluation.data import load
from megalite.evaluation.during_training import Answers, gold, spread
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model.sharded import ShardedModel
from megalite.text.tokenizers import ByteTokenizer
from megalite.train.trainer import Trainer
from tests.evaluation import support
from tests.support.pool import Pool
from tests.support.tiny import write_recipe, write_tokens

TASKS = ["mmlu", "gsm8k", "humaneval"]
MODEL = {"layers": 4, "hidden_size": 32, "heads": 4, "vocab_size": 257, "max_positions": 96}


def config_of(data: str, samples: int = 5, **parallel: Any) -> Config:
    return build_config(
        {
            "model": MODEL,
            "parallel": parallel,
            "data": {"tokenizer": "byte"},
            "train": {"seq_length": 16, "global_batch_size": 4, "precision": "fp32"},
            "eval": {"tasks": TASKS, "interval": 2, "data": data, "samples": samples},
        }
    )


def measure(rank: int, layout: dict[str, int], data: str, parallel: dict[str, Any]) -> dict[str, float]:
    mesh = Mesh(rank=rank, **layout)
    config = config_of(data, tensor=mesh.tp, pipeline=mesh.pp, **parallel)
    trainer = Trainer(config, mesh, select_kernels({}, torch.device("cpu")))
    trainer.initialise()
    answers = Answers(config, trainer)
    first = answers.measure()
    assert answers.measure() == first
    return first


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(support.write_data(tmp_path / "data", np.random.default_rng(), rows=7))


def definition(data: str) -> dict[str, float]:
    """One answer after the other."""
    config = config_of(data)
    model = ShardedModel(config, Mesh(), select_kernels({}, torch.device("cpu")), trained=False)
    model.initialise()
    stage, tokenizer, found = model.stages[0], ByteTokenizer(), {}
    for task in TASKS:
        nats, size = 0.0, 0
        for row in spread(load(task, data)["test"], 5):
            context, answer = gold(task, row)
            ids = tokenizer.encode(context + answer).tolist()
            count = len(answer.encode())
            if count > MODEL["max_positions"]:
                continue
            ids = ids[-(MODEL["max_positions"] + 1) :]
            x = torch.tensor([ids[:-1]])
            with torch.no_grad():
                logits_SV = stage.logits(stage(x, stage.positions(x.shape[1])))[-count:, 0]
            labels = torch.tensor(ids[-count:])
            nats -= logits_SV.double().log_softmax(-1).gather(1, labels[:, None]).sum().item()
            size += count
        found[f"{task}_bits_per_byte"] = nats / math.log(2) / size
    return found


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [
        ({}, {}),
        ({"tp": 2, "dp": 2}, {"sequence": True, "zero": 3}),
        ({"pp": 2, "dp": 2}, {"schedule": "interleaved", "virtual_stages": 2, "zero": 1}),
    ],
    ids=str,
)
def test_in_every_layout(pool: Pool, data: str, layout: dict[str, int], parallel: dict[str, Any]) -> None:
    """On the live model with gradients, ZeRO, sequence parallelism and several stages a rank; all ranks are told."""
    size = math.prod(layout.values())
    expected = definition(data)
    for found in pool.run(measure, size, layout, data, parallel):
        assert found == pytest.approx(expected, rel=1e-5)
    assert all(6 < value < 12 for value in expected.values())  # a model that knows nothing: 8 bits a byte


@pytest.mark.fast
def test_mistakes_are_told_to_all(pool: Pool, data: str, tmp_path: Path) -> None:
    """Data that cannot be read (on rank 0, which alone reads them), and a tokenizer that does not fit."""
    assert (
        pool.run(_refusal, 2, str(tmp_path / "nowhere"), 257)
        == [f"eval.data = {tmp_path}/nowhere: no such file or folder"] * 2
    )
    assert "model.vocab_size = 60" in pool.run(_refusal, 2, data, 60)[1]


def _refusal(rank: int, data: str, vocabulary: int) -> str:
    config = config_of(data)
    model = build_config({"model": MODEL | {"vocab_size": vocabulary}}).model
    mesh, kernels = Mesh(rank=rank, dp=2), select_kernels({}, torch.device("cpu"))
    object.__setattr__(config, "model", model)
    try:
        Answers(config, ShardedModel(config, mesh, kernels, trained=False))
    except UserError as error:
        return str(error)
    return "no error"


def test_in_the_metrics_of_a_run(data: str, tmp_path: Path) -> None:
    """Every second step and after the last; the numbers fall while the model learns the letters."""
    recipe = write_recipe(
        tmp_path,
        model=MODEL,
        data={"tokenizer": "byte"},
        train={"steps": 5},
        eval={"tasks": ["gsm8k", "mmlu"], "interval": 2, "data": data, "samples": 4},
        optimizer={"lr": 0.01},
    )
    write_tokens(tmp_path / "tokens", vocabulary=120)
    command = [sys.executable, "-m", "megalite.train", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("gsm8k_bits_per_byte", "mmlu_bits_per_byte"):
        assert [row["step"] for row in rows if name in row] == [2, 4, 5]
        values = [row[name] for row in rows if name in row]
        assert values[-1] < values[0]
    assert rows[1]["validation_seconds"] > rows[0]["validation_seconds"]
