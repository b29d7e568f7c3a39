"""tools/plan.py as users call it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from megalite.config import load_config
from megalite.config.check import check_layout
from tools.plan import main

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"
SMALL = ["--model.layers", "4", "--model.hidden_size", "512", "--model.ffn_hidden_size", "1408", "--model.heads", "8"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def plan(capsys, monkeypatch):
    """`plan(*arguments, recipe=name)` runs the program in this process."""

    def run(*arguments: str, recipe: str = "1b") -> Done:
        monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", str(RECIPES / f"{recipe}.toml"), *arguments])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.mark.fast
def test_json_tells_everything(plan):
    done = plan(
        *("--devices", "16", "--device-type", "a100", "--tokens", "2.4716288e11", "--price-per-hour", "2", "--json"),
        *("--", "--parallel.tensor", "2", "--train.micro_batch_size", "4"),
    )
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["parameters"] == 1235814400 and told["chinchilla_ratio"] == pytest.approx(10.0)
    assert told["flops_per_token"] == 6 * told["matmul_parameters"] + 12 * 16 * 2048 * 4096
    assert told["flops_per_token"] - told["flops_per_token_half_causal"] == 6 * 16 * 2048 * 4096
    assert told["layout"]["tensor"] == 2 and told["layout"]["data"] == 8 and told["layout"]["micro_batches"] == 4
    assert sum(told["memory_bytes"].values()) == pytest.approx(told["memory_total_bytes"])
    assert told["fits"] is True and 0.2 < told["mfu"] < 0.7
    rate = told["tokens_per_second"]
    assert rate == pytest.approx(128 * 4096 / told["step_seconds"])
    assert told["days"] == pytest.approx(2.4716288e11 / rate / 86400)
    assert told["cost"] == pytest.approx(told["days"] * 24 * 16 * 2)
    assert told["mfu"] == pytest.approx(told["flops_per_token"] * rate / 16 / 312e12)


@pytest.mark.fast
def test_tables_name_the_parts(plan):
    done = plan("--devices", "8192", "--device-type", "h200", recipe="llama3-405b-8192gpu")
    assert done.code == 0, done.err
    for words in (
        "405,853,388,800",
        "activations",
        "gradients",
        "fragmentation",
        "matrix products",
        "MFU",
        "Chinchilla",
    ):
        assert words in done.out
    assert "It fits" in done.out or "It does not fit" in done.out


@pytest.mark.fast
def test_a_cpu_has_no_peak_to_be_compared_with(plan):
    done = plan("--devices", "2", "--device-type", "cpu", "--json", *SMALL)
    told = json.loads(done.out)
    assert told["mfu"] is None and told["fits"] is None and told["cost"] is None and told["memory_total_bytes"] > 0


def test_the_searchs_toml_is_a_recipe(plan):
    done = plan("--devices", "4", "--device-type", "h100", "--search", *SMALL)
    assert done.code == 0, done.err
    assert "Best: " in done.out and "refused" in done.out
    layout = tomllib.loads(done.out[done.out.index("[parallel]") :])
    overrides = [
        word
        for section, table in layout.items()
        for name, value in table.items()
        for word in (f"--{section}.{name}", str(value))
    ]
    check_layout(load_config(RECIPES / "1b.toml", [*SMALL, *overrides]), 4)


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments, recipe, words",
    [
        (["--devices", "8", "--device-type", "h100"], "missing", "recipe"),
        (["--devices", "7", "--device-type", "h100"], "1b", "train.global_batch_size = 128"),
        (["--devices", "8", "--device-type", "v100"], "1b", "--device-type"),
        (["--devices", "0", "--device-type", "h100"], "1b", "--devices = 0 is too small"),
        (["--devices", "9" * 400, "--device-type", "h100", "--search"], "1b", "is too large; it must be at least 1"),
        (["--devices", "8", "--device-type", "h100"], "124m", "model.vocab_size"),
        (["--devices", "8", "--device-type", "h100", "--tokens", "-1"], "1b", "--tokens: '-1' is not a number above 0"),
        (["--devices", "8", "--device-type", "h100", "--parallel.tensro", "2"], "1b", "did you mean parallel.tensor"),
        (["--devices", "1", "--device-type", "a100", "--search"], "llama3-70b-256gpu", "no layout fits"),
    ],
)
def test_mistakes_are_one_line(plan, arguments, recipe, words):
    done = plan(*arguments, recipe=recipe)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and words in done.err


@pytest.mark.fast
def test_it_is_a_program():
    recipe = str(RECIPES / "1b.toml")
    command = [sys.executable, "tools/plan.py", "--recipe", recipe, "--devices", "3", "--device-type", "h100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: train.global_batch_size = 128")
