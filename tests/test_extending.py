"""The examples of docs/extending.md: each in every kind of layout, saved and resumed, exported or refused, and run from
a recipe beside them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.huggingface.export import export_huggingface
from megalite.checkpoint.huggingface.importer import import_huggingface
from megalite.checkpoint.huggingface.names import HuggingFaceSource
from megalite.checkpoint.manager import CheckpointManager
from megalite.checkpoint.source import CheckpointReader, load_weights
from megalite.config import ModelConfig
from megalite.errors import UserError
from megalite.generation.generator import Generator, Limits
from megalite.generation.sampling import Sampling
from megalite.kernels import select_kernels
from megalite.mesh import Mesh
from megalite.model import families
from megalite.model.cost import parameter_count
from megalite.model.decoder import Stage
from megalite.registry import BUILT_IN, look_up
from megalite.schedule.schedules import find_schedule
from tests.checkpoint import support
from tests.support import tiny
from tests.support.parity import (
    Case,
    Layout,
    assert_same_bits,
    assert_trains_as_alone,
    build_trainer,
    layouts,
    micro_batches,
    train_alone,
)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "examples"

EXAMPLES: dict[str, dict[str, Any]] = {
    "gated_attention": {"model.attention": "gated_attention:GatedAttention"},
    "relu2": {"model.feed_forward": "relu2:SquaredReLU"},
    "parallel_block": {"model.block": "parallel_block:ParallelBlock"},
    "focal_loss": {"objective.kind": "focal_loss:FocalLoss"},
    "lion": {"optimizer.kind": "lion:Lion", "optimizer.lr": 3e-4},
    "ia3": {"adapter.kind": "ia3:IA3"},
}
"""The fields that choose an example, as its recipe has them."""

EAGER = "docs.examples.eager_1f1b:EAGER"

LAYOUTS = [
    Layout(tensor=2, sequence=True, pipeline=2, schedule="zb_h1"),
    Layout(pipeline=2, schedule="interleaved", data=2, zero=3),
    Layout(pipeline=2, schedule="zb_v"),
]
each_example = pytest.mark.parametrize("example", EXAMPLES)


def fields_of(example: str) -> dict[str, Any]:
    """The same with modules that every worker of the tests finds."""
    return {
        field: f"docs.examples.{value}" if isinstance(value, str) else value
        for field, value in EXAMPLES[example].items()
    }


def case_of(example: str, **fields: Any) -> Case:
    return Case.of({"model.layers": 4, "train.global_batch_size": 8, **fields_of(example), **fields}, steps=3)


@pytest.mark.fast
def test_examples_are_short_and_built_in_names_lead_somewhere() -> None:
    files = list(FOLDER.glob("*.py"))
    assert len(files) >= 8
    for file in files:
        assert len(file.read_text().splitlines()) < 150, file
        assert file.name in (ROOT / "docs" / "extending.md").read_text()
    for field, names in BUILT_IN.items():
        assert all(callable(look_up(field, name)) for name in names)


# The same gradients and weights in every layout


@each_example
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_in_every_kind_of_layout(example: str, layout: Layout) -> None:
    assert_trains_as_alone(case_of(example), layout)


@pytest.mark.slow
@each_example
def test_in_all_layouts(example: str) -> None:
    for layout in layouts(4):
        stages = layout.pipeline * find_schedule(layout.schedule).least_chunks
        if stages <= 4 and 3 not in (layout.tensor, layout.pipeline, layout.data):  # 4 layers, 8 samples
            assert_trains_as_alone(case_of(example), layout)


@pytest.mark.parametrize("layout", [Layout(pipeline=4), Layout(tensor=2, pipeline=2)], ids=lambda layout: layout.name)
def test_the_schedule(layout: Layout) -> None:
    case = Case.of({"model.layers": 4, "train.global_batch_size": 8}, steps=3)
    assert_trains_as_alone(case, dataclasses.replace(layout, schedule=EAGER))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    for example in ("gated_attention", "relu2", "parallel_block", "ia3"):
        fields = {"adapter.targets": ("k_proj", "down_proj")} if example == "ia3" else {}
        case = case_of(example, **fields)
        again, kept = train_alone(case.having({"train.recompute": recompute})), train_alone(case)
        assert_same_bits(again, kept)


# Checkpoints


def sections_of(example: str) -> support.Tables:
    sections: support.Tables = {}
    for path, value in fields_of(example).items():
        section, name = path.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


FROM = support.Layout(tensor=2, sequence=True, data=2, zero=2)
TO = support.Layout(pipeline=3, schedule="zb_h1")


@each_example
def test_resumed_in_the_same_layout_and_in_another(pool: Any, tmp_path: Path, example: str) -> None:
    sections = sections_of(example)
    pool.run(support.resume, FROM.world, FROM, sections, str(tmp_path / "same"))
    saved = support.assemble(pool.run(support.save_trained, FROM.world, FROM, sections, str(tmp_path / "run"), 3))
    loaded = pool.run(support.load_all, TO.world, TO, sections, str(tmp_path / "own"), [str(tmp_path / "run")])
    there = support.assemble([results[0][2] for results in loaded])
    assert there.keys() == saved.keys()
    assert all(torch.equal(there[key], saved[key]) for key in saved)
    kinds = {kind for kind, _ in saved} - {"parameter", "weight"}
    assert kinds == ({"momentum"} if example == "lion" else {"exp_avg", "exp_avg_sq"})


@pytest.mark.fast
@pytest.mark.parametrize(
    "example, reason",
    {
        "gated_attention": "LlamaForCausalLM has no model.attention = 'docs.ex",
        "relu2": "LlamaForCausalLM has no model.feed_forward = 'docs",
        "parallel_block": "LlamaForCausalLM has no model.block = 'docs.ex",
        "ia3": "ia3_l is not part of LlamaForCausalLM",
    }.items(),
)
def test_what_no_family_has_is_not_exported(tmp_path: Path, example: str, reason: str) -> None:
    support.save_trained(0, support.Layout(), sections_of(example), str(tmp_path / "run"), 1)
    with CheckpointReader(tmp_path / "run") as reader, pytest.raises(UserError) as raised:
        export_huggingface(reader, tmp_path / "export")
    assert reason in str(raised.value) and not (tmp_path / "export").exists()


# What is particular to one of them


def generate(rank: int, case: Case, world: int) -> list[list[int]]:
    trainer = build_trainer(case.config(world), rank, world)
    trainer.step(micro_batches(0, 8, case.config(world), trainer.mesh, False), 1e-2)
    with trainer.generating() as stages:
        generator = Generator(stages, trainer.owners, trainer.mesh, trainer.config.model)
        return [row.new_ids for row in generator.run([[5, 1, 7], [3]], Sampling(temperature=0.0), Limits(6))]


@pytest.mark.parametrize("example", ["gated_attention", "relu2", "parallel_block", "ia3"])
def test_generation_goes_through_the_cache(pool: Any, example: str) -> None:
    """Each token is the likeliest of a model that sees all before it at once; the same in another layout."""
    case = case_of(example, **{"adapter.targets": ()})
    spoken = generate(0, case, 1)
    trainer = build_trainer(case.config(1), 0, 1)
    trainer.step(micro_batches(0, 8, case.config(1), trainer.mesh, False), 1e-2)
    stage = trainer.stages[0]
    for prompt, new in zip([[5, 1, 7], [3]], spoken):
        ids_BS = torch.tensor([prompt + new])
        with torch.no_grad():
            logits_SBV = stage.logits(stage(ids_BS, stage.positions(ids_BS.shape[1])))
        assert logits_SBV[len(prompt) - 1 : -1, 0].argmax(-1).tolist() == new
    layout = Layout(tensor=2, sequence=True, pipeline=2)
    for theirs in pool.run(generate, 4, case.having(layout.fields), 4):
        assert theirs == spoken


@pytest.mark.fast
def test_the_gate_is_counted() -> None:
    plain = ModelConfig(layers=3, hidden_size=20, heads=4, kv_heads=2, head_dim=6, vocab_size=37)
    gated = dataclasses.replace(plain, attention="docs.examples.gated_attention:GatedAttention")
    assert parameter_count(gated) - parameter_count(plain) == 3 * 4 * 6 * 20


def test_the_metric_is_a_mean_probability() -> None:
    case = case_of("focal_loss")
    trainer = build_trainer(case.config(1), 0, 1)
    batches = micro_batches(0, 8, case.config(1), trainer.mesh, False)
    labels = [batch.labels_BS for batch in batches]
    expected = sum(s[0].exp()[label >= 0].sum() for s, label in zip(trainer.score(batches), labels))
    result = trainer.step(batches, 1e-3)
    assert result.metrics == {"p": pytest.approx(float(expected) / result.units, rel=1e-5)}


def adapt(rank: int, layout: support.Layout, base: str, own: str) -> tuple[support.Pieces, support.Pieces]:
    """Start an adapter from a checkpoint without one and train it."""
    plain, config = support.make_config(layout), support.make_config(layout, **sections_of("ia3"))
    frozen, trainer = support.make_trainer(plain, layout, rank), support.make_trainer(config, layout, rank)
    batches = micro_batches(0, 4, plain, frozen.mesh, False)
    with CheckpointManager(own, config, trainer.mesh) as manager:
        with pytest.raises(UserError, match=r"no optimizer state of .*ia3_l.*load_optimizer = false"):
            manager.load(trainer, base)
        manager.load(trainer, base, optimizer=False)
    with CheckpointManager(base, plain, frozen.mesh) as manager:
        manager.load(frozen, base)
    for mine, theirs in zip(trainer.score(batches), frozen.score(batches), strict=True):
        assert torch.equal(mine, theirs)
    before = support.held(trainer)
    for segment in trainer.segments:
        adapter = segment.bucket.role == "adapter"
        assert bool(segment.state) == (segment.gradient is not None) == adapter
    losses = support.train(trainer, 4, seed=5)
    assert losses[-1] != losses[0]
    return before, support.held(trainer)


@pytest.mark.parametrize(
    "layout", [support.Layout(), support.Layout(tensor=2, sequence=True, data=2, zero=3)], ids=["alone", "t2s-d2-z3"]
)
def test_an_adapter_trains_nothing_but_itself(pool: Any, tmp_path: Path, layout: support.Layout) -> None:
    support.save_trained(0, support.Layout(), {}, str(tmp_path / "base"), 1)
    for before, after in pool.run(adapt, layout.world, layout, str(tmp_path / "base"), str(tmp_path / "own")):
        assert before.keys() == after.keys()
        for (kind, name), pieces in before.items():
            same = all(torch.equal(old[2], new[2]) for old, new in zip(pieces, after[kind, name]))
            if "ia3_" not in name:
                assert kind == "parameter" and same, name
            elif kind == "weight":
                assert not same, name


def test_ministral_there_and_back_and_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the folder of families is all that it takes."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "found").mkdir()
    shutil.copy(FOLDER / "ministral.py", tmp_path / "found")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "found")])
    monkeypatch.setattr(families, "FAMILIES", families.families_in(families.__path__))
    config = transformers.MinistralConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=101, max_position_embeddings=128, sliding_window=9, pad_token_id=0, eos_token_id=2,
        dtype="float32", layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = transformers.MinistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "ministral")
    with HuggingFaceSource(tmp_path / "ministral") as source:
        assert source.model.windows == (9, None, 9)
        stage = Stage(source.model, Mesh(), select_kernels({"default": "reference"}, torch.device("cpu")))
        load_weights([stage], source)
    ids_BS = torch.randint(101, (2, 24))
    with torch.no_grad():
        ours, theirs = stage.logits(stage(ids_BS, stage.positions(24))).transpose(0, 1), model(ids_BS).logits
    assert (ours - theirs).abs().max() < 2e-4
    import_huggingface(tmp_path / "ministral", tmp_path / "run")
    with CheckpointReader(tmp_path / "run") as reader:
        export_huggingface(reader, tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ministral" / name).read_bytes()


# As a user runs them


def program(*arguments: object, path: Path | None = None) -> str:
    places = os.pathsep.join(str(place) for place in (ROOT, path) if place)
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_recipe_names_the_modules_beside_it(tmp_path: Path) -> None:
    """All of them in one model: trained, resumed, spoken with."""
    sections: dict[str, dict[str, Any]] = {"parallel": {"schedule": "eager_1f1b:EAGER"}}
    for fields in EXAMPLES.values():
        for path, value in fields.items():
            section, name = path.split(".")
            sections.setdefault(section, {})[name] = value
    for file in FOLDER.glob("*.py"):
        shutil.copy(file, tmp_path)
    recipe = tiny.write_recipe(tmp_path, **sections)
    program("-m", "megalite.train", recipe, "--train.stop_after", 3)
    program("-m", "megalite.train", recipe)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["p"] < 1 for row in rows)
    tool = (ROOT / "tools" / "generate.py", "--checkpoint", tmp_path / "run", "--run.device", "cpu")
    spoken = program(*tool, "--prompt-ids", "[1, 2]", "--max-new-tokens", 3, path=tmp_path)
    assert len(json.loads(spoken)["ids"][0]) == 5
