"""Values on their way into a job's script: what srun is given is exactly what the user gave, and nothing else runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import sbatch, slurm
from launch.sbatch import ROOT, BatchJob, directive, render, shell
from megalite.errors import UserError
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.fast

SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$FOLDER/arguments"
printenv -0 > "$FOLDER/environment"
"""
NASTY = (
    "$(touch canary)",
    "`touch canary`",
    "; touch canary;",
    "' touch canary '",
    '"$HOME"',
    "\\",
    "#",
    "%j",
    "é",
    "~",
)
FORBIDDEN = ("\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\udcff")

letters = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=5)
value = st.lists(st.one_of(st.sampled_from(NASTY), letters), min_size=1, max_size=4).map("".join)
name = value.map(lambda text: "n" + text.replace("/", "").replace("\\", ""))


def job(folder, name="run", overrides=(), *arguments):
    options = slurm.parser().parse_args(["--recipe", "r.toml", "--nodes", "2", "--no-preflight", *arguments])
    return BatchJob(options, "name", folder / name, tuple(overrides), 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with stand-ins for SLURM's programs."""
    folder = tmp_path_factory.mktemp("job")
    programs = {"srun": SRUN, "scontrol": "#!/bin/bash\nprintf 'n0\\nn1\\n'\n", "squeue": "#!/bin/bash\n"}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=name, overrides=st.lists(value, max_size=3), extra=value, variable=value, python=value.filter(bool))
def test_what_srun_is_given(folder, monkeypatch, name, overrides, extra, variable, python):
    monkeypatch.chdir(folder)
    overrides = [word for text in overrides for word in ("--data.tokenizer", text)]
    options = [f"--extra-srun={extra}", f"--env=GIVEN={variable}", f"--python={python}", "--master-addr=10.0.0.1"]
    planned = job(folder / "runs", name, overrides, *options)
    (planned.run_dir / "launch").mkdir(parents=True, exist_ok=True)
    place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2", "FOLDER": str(folder)}
    done = subprocess.run(
        ["bash", "-c", render(planned)],
        env={**place, "PATH": f"{folder}/bin:{os.environ['PATH']}"}, capture_output=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    given = (folder / "arguments").read_bytes().decode().split("\0")[:-1]
    log = str(planned.run_dir).replace("%", "%%") + "/log/slurm-7-r0-rank_%5t.out"
    assert given[3:] == [
        *["--cpus-per-task=8", "--gpu-bind=none", "--cpu-bind=none", extra, "--kill-on-bad-exit=1", "--unbuffered"],
        *[f"--output={log}", "bash", f"{ROOT}/launch/entry.sh", python, "-m", "megalite.train"],
        *[f"{planned.submission}.toml", "--run.dir", str(planned.run_dir), *overrides],
    ]
    assert f"GIVEN={variable}" in (folder / "environment").read_bytes().decode().split("\0")
    assert not list(folder.rglob("canary"))
    shutil.rmtree(folder / "runs")


@pytest.mark.parametrize("way_in", [lambda text: shell("x", text), lambda text: directive("x", text), sbatch.comment])
@given(text=st.one_of(st.text(), st.sampled_from(FORBIDDEN)))
def test_a_line_stays_one_line(way_in, text):
    try:
        line = way_in(text)
    except UserError as error:
        assert "\n" not in str(error) and not text.isprintable()
    else:
        assert len(f"{line}x".splitlines()) == 1 and not set(FORBIDDEN) & set(text)
        assert line.encode()


@pytest.mark.parametrize("letter", FORBIDDEN)
@pytest.mark.parametrize("place", ["run.dir", "override", "option", "variable", "working directory"])
def test_line_ends_and_control_characters_are_refused_everywhere(tmp_path, monkeypatch, capsys, place, letter):
    """By the program that a user calls, in one line that names the place."""
    monkeypatch.chdir(tmp_path)
    text = f"a{letter}touch canary"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text((ROOT / "launch/recipes/1b.toml").read_text())
    arguments = ["--recipe", str(recipe), "--nodes", "1", "--dry-run"]
    if place == "working directory":
        if letter == "\0":
            pytest.skip("no path holds it")
        monkeypatch.setattr(Path, "cwd", lambda: tmp_path / text)
        name = "chdir"
    elif place == "option":
        arguments, name = [*arguments, "--account", text], "--account"
    elif place == "variable":
        arguments, name = [*arguments, "--env", f"NAME={text}"], "--env"
    elif place == "override":
        arguments, name = [*arguments, "--", "--data.tokenizer", text], "data.tokenizer"
    else:
        arguments, name = [*arguments, "--", "--run.dir", text], "run.dir"
    with pytest.raises(SystemExit) as ended:
        slurm.main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert name in said.err and said.err.startswith("error: ") and len(said.err.splitlines()) == 1
