"""Alignment by the program that users start: kill and resume, other layouts, faults of rewards, reward models."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface.export import export_huggingface
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.source import CheckpointReader
from megalite.train import policy_task
from megalite.train.__main__ import main
from megalite.train.trainer import Trainer
from tests.align import tiny
from tests.align.test_policy import small
from tests.support.parity import Layout, assemble, pieces_of_weights
from tests.support.pool import Pool, WorkerError
from tests.support.tiny import write_recipe

Fields = dict[str, dict[str, Any]]

MODEL = {
    "layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "heads": 4,
    "kv_heads": 2,
    "vocab_size": 257,
    "max_positions": 64,
}


def write_prompts(path: Path, count: int = 24) -> Path:
    """Prompts as token ids and, every other one, as text."""
    rows = [
        {"prompt": f"say {number}: " if number % 2 else [65, 66, number + 1], "number": number}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def length(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], number: Sequence[int]
) -> list[float]:
    """Short answers to prompts with a number."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(number)
    return [-float(len(ids)) / 8 + sum(token % 2 for token in ids) / 8 for ids in completion_ids]


def raises(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    raise KeyError("no such answer")


def gives_nan(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


def gives_too_few(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    return [0.0]


def gives_none(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
    return None


def recipe(folder: Path, **sections: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    fields: Fields = {
        "model": MODEL,
        "data": {"train": [str(write_prompts(folder / "prompts.jsonl"))], "tokenizer": "byte"},
        "objective": {"kind": "ppo"},
        "train": {"steps": 3, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 6, "reward": "tests.align.test_runs:length"},
        "policy": {"epochs": 2, "minibatches": 2, "kl_target": 1.0, "kl_horizon": 50.0},
        "checkpoint": {"interval": 1, "keep": 0},
        "optimizer": {"lr": 1e-3},
    }
    for name, values in sections.items():
        fields[name] = fields.get(name, {}) | values
    return str(write_recipe(folder, **fields))


def state_of(run: Path, step: int) -> dict[str, Any]:
    """Everything that a checkpoint holds but its run's own numbers."""
    with CheckpointReader(run / "checkpoints" / f"step_{step:08d}") as reader:
        tensors = {
            (kind, name): reader.read_kind(kind, name, (0,) * len(entry.shape), entry.shape)
            for kind, entries in reader.manifest.index.items()
            for name, entry in entries.items()
        }
        return tensors | {"updates": reader.manifest.updates, "task": reader.manifest.state["task"]}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
        for key, value in theirs.items()
    )


KILLS = ("_answer", "_call_reward", "_judge", "step", "critic")


def die_there(rank: int, argv: list[str], place: str) -> None:
    """Run until the second step's call of `place`, and die in it like a killed process."""
    calls = {"_answer": 2, "_call_reward": 2, "_judge": 2, "step": 11, "critic": 14}[place]
    owner: Any = policy_task.PolicyTask if place.startswith("_") else Trainer
    name = place if place.startswith("_") else "step"
    real = getattr(owner, name)
    seen = 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == calls:
            os._exit(9)
        return real(*arguments, **named)

    setattr(owner, name, counting)
    main(argv)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([recipe(folder)]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.slow) if number else place for number, place in enumerate(KILLS)]
)
def test_killed_anywhere_in_a_step_and_resumed_to_the_same_bits(
    place: str, tmp_path: Path, undisturbed: Path, pool: Pool
) -> None:
    argv = [recipe(tmp_path)]
    with pytest.raises(WorkerError):
        pool.run(die_there, 1, argv, place)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert left == ["step_00000001"]
    assert main(argv) == 0
    for step in (2, 3):
        assert same(state_of(tmp_path / "run", step), state_of(undisturbed, step))


def test_a_run_of_two_processes_of_the_program_in_halves(tmp_path: Path, undisturbed: Path) -> None:
    argv = [recipe(tmp_path, train={"stop_after": 2})]
    assert main(argv) == 0
    assert main([recipe(tmp_path)]) == 0
    assert same(state_of(tmp_path / "run", 3), state_of(undisturbed, 3))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    first = rows[0]
    assert first["ratio_deviation"] == 0.0 and first["kl"] == 0.0 and first["sampler_difference"] < 1e-5
    assert rows[1]["kl_weight"] != first["kl_weight"]


def save_rank(rank: int, folder: str, layout: Layout) -> Any:
    task = tiny.build_task(small(layout, "ppo"), layout, rank)
    tiny.train(task, 1)
    with CheckpointManager(folder, task.config, task.mesh) as manager:
        manager.save(task.saved, {"step": 1, "task": task.state()})
    pieces = pieces_of_trainers(task)
    tiny.train(task, 1, first=1)
    return pieces, pieces_of_trainers(task)


def load_rank(rank: int, folder: str, layout: Layout, more: int) -> Any:
    task = tiny.build_task(small(layout, "ppo"), layout, rank)
    with CheckpointManager(folder, task.config, task.mesh) as manager:
        state = manager.load_latest(task.saved)
        assert state is not None
        task.prepare(state["task"])
    tiny.train(task, more, first=1)
    return pieces_of_trainers(task)


def pieces_of_trainers(task: Any) -> list[Any]:
    return [piece for trainer in task._together.trainers for piece in pieces_of_weights(trainer)]


def test_policy_and_critic_in_another_layout(tmp_path: Path, pool: Pool) -> None:
    before = Layout(tensor=2, sequence=True, pipeline=2)
    ranks = pool.run(save_rank, 4, str(tmp_path), before)
    saved, went_on = (assemble([rank[number] for rank in ranks], 1) for number in (0, 1))
    assert any(name.startswith("critic.") for name in saved)
    for layout in (Layout(data=2, zero=3), Layout()):
        found = assemble(pool.run(load_rank, layout.world, str(tmp_path), layout, 0), layout.data)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    again = assemble(pool.run(load_rank, 4, str(tmp_path), before, 1), 1)
    assert all(torch.equal(again[name], went_on[name]) for name in went_on)


@pytest.mark.parametrize(
    ("reward", "said"),
    (
        ("raises", "raised KeyError: 'no such answer'"),
        ("gives_nan", "returned nan for the answer"),
        ("gives_too_few", "returned 1 scores for 8 answers"),
        ("gives_none", "must return one number for each answer"),
    ),
)
def test_a_faulty_reward_ends_the_run_in_one_line_and_loses_nothing(
    reward: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe(tmp_path, train={"stop_after": 1}, checkpoint={"interval": 0})]) == 0
    argv = [recipe(tmp_path, rollout={"reward": f"tests.align.test_runs:{reward}"}, checkpoint={"interval": 0})]
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and said in error[0] and "rollout.reward" in error[0]
    assert main([recipe(tmp_path, checkpoint={"interval": 0})]) == 0


def test_the_steps_before_a_faulty_reward_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    calls = 0

    def failing_late(*arguments: Any, **named: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the judge is away")
        return length(**named)

    argv = [recipe(tmp_path, checkpoint={"interval": 0})]
    with monkeypatch.context() as patch:
        patch.setattr(policy_task, "reward_function", lambda name: failing_late)
        assert main(argv) == 2
    assert same(state_of(tmp_path / "run", 2), state_of(undisturbed, 2))
    assert main(argv) == 0
    assert same(state_of(tmp_path / "run", 3), state_of(undisturbed, 3))


def test_another_objective_does_not_go_on_from_a_run(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"objective": {"kind": "grpo"}, "rollout": {"answers": 2}, "policy": {"minibatches": 4}}
    assert main([recipe(tmp_path, run={"dir": str(undisturbed)}, **answers)]) == 2
    assert "was trained with objective.kind = 'ppo', and it is now 'grpo'; use another" in capsys.readouterr().err


def toy_pairs(path: Path) -> Path:
    """Chosen answers are made of a's, rejected ones of b's."""
    rows = [
        {"prompt": f"{number}:", "chosen": "a" * (1 + number % 5), "rejected": "b" * (1 + number % 3)}
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_reward_model_separates_a_toy_set_and_scores_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    pairs = str(toy_pairs(tmp_path / "pairs.jsonl"))
    fields: Fields = {
        "objective": {"kind": "reward", "center": 0.01},
        "data": {"train": [pairs], "valid": [pairs]},
        "train": {"steps": 30, "seq_length": 64, "eval_interval": 30, "micro_batch_size": 2},
        "checkpoint": {"interval": 0},
        "optimizer": {"lr": 3e-3},
    }
    assert main([recipe(tmp_path, **fields)]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_accuracy"] >= 0.99
    with CheckpointReader(tmp_path / "run") as reader:
        export_huggingface(reader, tmp_path / "exported")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    for text in ("3:aaa", "3:bb", "39:aaaaa"):
        ids = list(text.encode())
        ours = score(tmp_path / "run", ids)
        assert ours == pytest.approx(theirs(torch.tensor([ids])).logits.item(), abs=1e-4)
        assert ours == pytest.approx(score(tmp_path / "exported", ids), abs=1e-6)


def score(path: Path, ids: list[int]) -> float:
    """The score of one text by a frozen model, as PPO loads it."""
    from megalite.align.frozen import load_frozen
    from megalite.checkpoint.peers import Peers
    from megalite.data.batch import Batch
    from megalite.kernels import select_kernels
    from megalite.mesh import Mesh

    config = small(Layout(), "ppo", model={"vocab_size": MODEL["vocab_size"]})
    mesh = Mesh()
    field = "rollout.reward_model"
    model, identity = load_frozen(
        config, mesh, select_kernels({}, mesh.device), Peers(mesh), str(path), field=field, head="scalar"
    )
    assert identity["source"].startswith(str(path))
    tokens = torch.tensor([ids])
    return model.values([Batch(tokens, tokens)], shape=(1, len(ids)))[0][0, -1].item()


def test_a_reward_model_and_a_function_are_added(tmp_path: Path) -> None:
    pairs = str(toy_pairs(tmp_path / "pairs.jsonl"))
    judge = tmp_path / "judge"
    fields: Fields = {
        "objective": {"kind": "reward"},
        "data": {"train": [pairs]},
        "train": {"steps": 1, "seq_length": 64},
        "run": {"dir": str(judge)},
    }
    assert main([recipe(tmp_path / "first", **fields)]) == 0
    means = []
    for name, reward in (
        ("function", {}),
        ("model", {"reward": "", "reward_model": str(judge)}),
        ("both", {"reward_model": str(judge)}),
    ):
        folder = tmp_path / name
        assert main([recipe(folder, rollout=reward, train={"steps": 1}, policy={"critic": str(judge)})]) == 0
        row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
        means.append(row["reward_mean"])
    assert means[2] == pytest.approx(means[0] + means[1], abs=1e-6) and means[1] != 0.0
