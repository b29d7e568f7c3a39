"""tools/compare.py from end to end: its line, its exit codes, its page; checkouts, Hugging Face models, samples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from megalite.checkpoint.huggingface.names import HuggingFaceSource
from tests.fixtures import golden
from tests.support.tiny import write_recipe, write_tokens

ROOT = Path(__file__).parents[2]
FEW = ("--steps", "1", "--noise-runs", "1")


def compare(recipe: Path, *arguments: str) -> tuple[int, dict, str]:
    """(exit code, the line, standard error)."""
    command = [sys.executable, str(ROOT / "tools/compare.py"), str(recipe), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) <= 1
    return done.returncode, json.loads(lines[0]) if lines else {}, done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.mark.slow
def test_equal_and_different_layouts(recipe, tmp_path):
    page = tmp_path / "page"
    code, line, errors = compare(recipe, "--a", "", "--b", "--parallel.tensor 2", *FEW, "--output", str(page))
    assert code == 0 and not errors, errors
    assert line["equal"] is True and line["first"] is None and line["compared"] > 150
    assert "No tensor differs" in (page / "compare.html").read_text() and (page / "compare.png").stat().st_size > 1000
    other = "--parallel.pipeline 2 --model.norm_eps 1e-4"
    code, line, _ = compare(recipe, "--a", "", "--b", other, *FEW, "--output", str(page), "--sample", "40")
    assert code == 1 and line["equal"] is False
    first = line["first"]
    assert (first["name"], first["kind"], first["step"]) == ("model.layers.0.input_layernorm", "activation", 1)
    assert first["rank"] == 0 and first["difference"] > 0.01 and first["noise"] < 1e-5
    assert first["operation"] == "model.layers.0.input_layernorm forward"
    assert "model.layers.0.input_layernorm differs first" in (page / "compare.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--a", "", "--b", "--model.norm_ep 1"), "did you mean model.norm_eps"),
        (("--a", "", "--b", "--train.global_batch_size 8"), "train.global_batch_size is 4 in a and 8 in b"),
        (("--a", "", "--b", "'"), "quote it as a shell would"),
        (("--a", "", "--b", "hf:nowhere"), "a Hugging Face directory"),
        (("--a", "", "--b", "", "--b-tree", "docs"), "name a checkout"),
        (("--a", "", "--b", "--parallel.tensor 2", "--b-processes", "3"), "3"),
    ],
)
def test_what_cannot_be_compared_is_refused(recipe, arguments, words):
    code, line, errors = compare(recipe, *arguments)
    assert code == 2 and not line
    assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors


@pytest.mark.slow
def test_another_checkout(recipe, tmp_path):
    """Its errors are its own: megalite of the copy is used but for the package that records."""
    tree = tmp_path / "tree"
    for folder in ("megalite", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = tree / "megalite" / "optim" / "lr_schedule.py"
    file.write_text(file.read_text().replace("optimizer.lr * step /", "optimizer.lr * (step + 1) /"))
    warm = "--optimizer.warmup_steps 4"
    code, line, errors = compare(recipe, "--a", warm, "--b", warm, "--b-tree", str(tree), *FEW)
    assert code == 1 and line["first"]["kind"] == "lr", (line, errors)
    assert line["first"]["operation"] == "learning rate schedule"
    assert line["same_bits"] > 0.6 * line["compared"]  # all before the update, and the moments


def of_family(folder: Path, name: str) -> Path:
    """A recipe for the model of a fixture."""
    with HuggingFaceSource(golden.folder(name)) as source:
        model = golden.training_config(source.model).model
    write_tokens(folder / "tokens", vocabulary=model.vocab_size)
    from dataclasses import asdict

    fields = {key: value for key, value in asdict(model).items() if value not in (None, {}, (), [])}
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    recipe = {
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "model": fields,
        "data": {"train": [str(folder / "tokens")]},
        "train": {"steps": 4, "seq_length": 16, "global_batch_size": 4, "precision": "fp32"},
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return folder / "recipe.toml"


@pytest.mark.slow
def test_a_hugging_face_model(tmp_path):
    pytest.importorskip("transformers")
    recipe = of_family(tmp_path, "llama3_gqa")
    source = golden.folder("llama3_gqa")
    code, line, errors = compare(recipe, "--a", "--parallel.tensor 2", "--b", f"hf:{source}", *FEW)
    assert code == 0 and line["compared"] > 60, (line, errors)
    from safetensors.numpy import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(source, wrong)
    tensors = load_file(wrong / "model.safetensors")
    victim = np.random.default_rng().choice([key for key in tensors if key.endswith("k_proj.weight")])
    tensors[victim] = np.ascontiguousarray(tensors[victim][::-1])
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    code, line, errors = compare(recipe, "--a", f"--checkpoint.load {source}", "--b", f"hf:{wrong}", *FEW)
    assert code == 1 and line["first"]["name"] == victim and line["first"]["kind"] == "weight", (line, errors)
    assert line["first"]["operation"] == "initial weights" and line["first"]["step"] == 0
