"""Adapters by the programs that users start: trained, resumed, asked, converted; and mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.source import CheckpointReader
from megalite.train.__main__ import main
from tests.align.test_runs import recipe

ROOT = Path(__file__).parents[2]
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


def write_conversations(path: Path) -> str:
    rows = [{"prompt": f"say {number}: ", "completion": f"{number} it is"} for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def program(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


def sft(folder: Path, **sections: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": [write_conversations(folder / "conversations.jsonl")]}
    fields = {"objective": {"kind": "sft"}, "data": data, "adapter": LORA, "policy": {}, "rollout": {}}
    train = {"steps": 4, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "precision": "bf16"}
    return recipe(folder, **{**fields, "train": train, **sections})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain run of one step."""
    folder = tmp_path_factory.mktemp("base")
    assert main([sft(folder, adapter={}, train={"steps": 1, "seq_length": 32, "global_batch_size": 4})]) == 0
    return folder / "run"


def load(base: Path) -> dict[str, Any]:
    return {"load": str(base), "load_optimizer": False, "interval": 2, "keep": 0}


def whole(run: Path) -> dict[str, Any]:
    with CheckpointReader(run) as reader:
        return {
            (kind, name): reader.read_kind(kind, name, (0,) * len(entry.shape), entry.shape)
            for kind, entries in reader.manifest.index.items()
            for name, entry in entries.items()
        }


def test_a_run_from_its_recipe_to_the_merged_model(base: Path, tmp_path: Path) -> None:
    straight = sft(tmp_path / "straight", checkpoint=load(base))
    stopped = sft(tmp_path / "stopped", checkpoint=load(base))
    assert main([straight]) == 0
    assert main([stopped, "--train.stop_after", "2"]) == 0
    assert main([stopped]) == 0
    ours, theirs = (whole(tmp_path / name / "run") for name in ("straight", "stopped"))
    assert ours.keys() == theirs.keys() and all("lora_" in name for _, name in ours)
    assert all(torch.equal(values, theirs[key]) for key, values in ours.items())
    log = next((tmp_path / "straight" / "run").glob("logs/*0*.log"), None)
    assert log is None or "lora: 6,272 parameters are trained" in log.read_text()
    run, merged = tmp_path / "straight" / "run", tmp_path / "merged"
    done = program("tools/convert_checkpoint.py", "merge", run, merged)
    assert "2 layers, whole weights" in done.stdout
    program("tools/convert_checkpoint.py", "to-hf", run, tmp_path / "peft")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (tmp_path / "peft").iterdir()}
    program("tools/convert_checkpoint.py", "to-hf", merged, tmp_path / "hf")
    said = [
        json.loads(
            program(
                *("tools/generate.py", "--checkpoint", place, "--run.device", "cpu", "--train.precision", "fp32"),
                *("--prompt-ids", "[115, 97, 121]", "--max-new-tokens", 6),
            ).stdout
        )
        for place in (run, merged, tmp_path / "peft")
    ]
    assert said[0]["ids"] == said[1]["ids"] == said[2]["ids"]


@pytest.mark.parametrize("kind", ["dpo", "reward", "grpo"])
def test_preferences_and_policies_from_a_base(base: Path, tmp_path: Path, kind: str) -> None:
    data: dict[str, Any] = {}
    if kind != "grpo":
        rows = [{"prompt": f"say {n}: ", "chosen": f"{n}", "rejected": "no"} for n in range(24)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": [str(tmp_path / "pairs.jsonl")]}
    fields: dict[str, Any] = {"objective": {"kind": kind}, "adapter": LORA, "checkpoint": load(base), "data": data}
    if kind == "grpo":
        fields |= {"rollout": {"answers": 2, "prompts_per_step": 4}, "policy": {"kl_target": 0.0}}
    path = recipe(tmp_path, **fields)
    assert main([path, "--train.stop_after", "2"]) == 0
    assert main([path]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    if kind == "dpo":
        assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-7)
    if kind == "grpo":
        assert rows[0]["kl"] == 0.0
    names = {name for _, name in whole(tmp_path / "run")}
    assert {name for name in names if "lora_" not in name} == ({"score.weight"} if kind == "reward" else set())


def test_mistakes_end_with_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sft(tmp_path, checkpoint=load(base))
    for arguments, message in (
        (["--adapter.targets", '["q_prj"]'], "adapter.targets names 'q_prj'"),
        (["--adapter.rank", "0"], "adapter.rank = 0"),
        (["--adapter.rank", "33"], "adapter.rank = 33 exceeds the 32 features of q_proj"),
        (["--adapter.kind", "lorra"], "did you mean lora?"),
        (["--model.hidden_size", "48"], "model.hidden_size is 32 in the checkpoint and 48 in the configuration"),
    ):
        for check in ([], ["--check"]) if "targets" in arguments[0] else ([],):
            assert main([path, *arguments, *check]) == 2
            error = capsys.readouterr().err
            assert error.splitlines()[-1].startswith("error: ") and message in error.splitlines()[-1], error
    assert main([path, "--train.stop_after", "1"]) == 0
    capsys.readouterr()
    assert main([path, "--adapter.alpha", "9"]) == 2
    assert "has adapter.alpha = 8.0, and it is now 9.0" in capsys.readouterr().err
