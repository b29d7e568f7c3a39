"""launch/common.sh: which Python is taken, whose torch, and what is said where something is missing."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


def shell(script, **environment):
    """Run a line after sourcing common.sh, with exactly this environment."""
    return subprocess.run(
        [shutil.which("bash"), "-c", f"set -euo pipefail; source {ROOT}/launch/common.sh; {script}"],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def programs(tmp_path):
    """A directory to be the whole PATH: `dirname`, `cat` and what a test adds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "cat"):
        (folder / name).symlink_to(shutil.which(name))

    def add(name, text):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    add.path = str(folder)
    return add


def test_every_script_is_valid():
    for path in [*ROOT.glob("launch/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"]:
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_an_old_python_is_passed_over_and_none_at_all_is_refused(programs):
    programs("python3", "exit 1")
    done = shell("base_python", PATH=programs.path)
    assert done.returncode == 2 and "Python 3.11 or newer is needed" in done.stderr
    programs("python3.12", "exit 0")
    assert shell("base_python", PATH=programs.path).stdout.strip() == f"{programs.path}/python3.12"


def test_the_active_environment_comes_first(programs, tmp_path):
    programs("python3", "exit 0")
    active = tmp_path / "active" / "bin"
    active.mkdir(parents=True)
    (active / "python").symlink_to(sys.executable)
    done = shell("base_python", PATH=programs.path, VIRTUAL_ENV=str(active.parent))
    assert done.stdout.strip() == str(active / "python")
    # .venv itself is what is to be made, not what it is made from
    done = shell("base_python", PATH=programs.path, VIRTUAL_ENV=str(ROOT / ".venv"))
    assert done.stdout.strip() == f"{programs.path}/python3"
    # nor where it is first on the path without being active: making it anew would begin by removing it
    done = shell("base_python", PATH=f"{ROOT}/.venv/bin:{programs.path}")
    assert done.stdout.strip() == f"{programs.path}/python3"


def test_only_a_python_with_this_checkout_installed_runs_it(programs, tmp_path):
    find = 'prepare_environment() { PYTHON=made; }; find_python; echo "$PYTHON"'
    active = tmp_path / "active" / "bin"
    active.mkdir(parents=True)
    for installed, taken in ((ROOT / "megalite", str(active / "python")), ("/another/checkout/megalite", "made")):
        (active / "python").write_text(f"#!/bin/sh\necho {installed}\n")
        (active / "python").chmod(0o755)
        assert shell(find, PATH=programs.path, VIRTUAL_ENV=str(active.parent)).stdout.strip() == taken


def pretend(folder, name, version, **files):
    """An installed package, as far as its metadata goes."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (metadata / file.replace("__", "-").replace("_", ".").replace("-", "_")).write_text(text)


VENDORS = "2.11.0a0+1234abc.nv26.1"


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("2.11.0+cu130", True), (VENDORS, True), ("2.11a0", True), ("3.0", True), ("2.10.9", False)],
)
def test_torch_is_lent_where_it_is_new_enough(tmp_path, version, accepted):
    pretend(tmp_path, "torch", version)
    done = shell(f"torch_of {sys.executable} || true", PATH=os.environ["PATH"], PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == (str(tmp_path) if accepted else "")


def test_a_vendors_torch_is_left_alone(tmp_path):
    """Neither asked for nor replaced, although no registry has it, it counts as older than 2.11, and pip freeze would
    write a file's address in the place of its version."""
    address = json.dumps({"url": "file:///opt/torch.whl", "archive_info": {}})
    pretend(tmp_path / "lender", "torch", VENDORS, direct__url_json=address)
    pretend(tmp_path / "lender", "triton", "3.6.0+git1")
    (tmp_path / "lender" / "triton.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lender")}
    subprocess.run([sys.executable, ROOT / "launch/lent.py", tmp_path, "dev"], env=environment, check=True)
    constraints = (tmp_path / "lent.txt").read_text().splitlines()
    assert constraints[:2] == [f"torch=={VENDORS}", "triton==3.6.0+git1"]
    wanted = (tmp_path / "wanted.txt").read_text()
    assert "numpy>=" in wanted and "pytest>=" in wanted and "torch" not in wanted and "triton" not in wanted
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = next(line for line in own if line.startswith("torch"))
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-c", tmp_path / "lent.txt", torch]
    done = subprocess.run(pip, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "already satisfied" in done.stdout, done.stderr


def test_beside_a_lent_torch_nothing_is_asked_for_by_dependency(tmp_path):
    """What pip is told, by a stand-in for the environment's Python that runs the rest for real."""
    (tmp_path / "python").write_text(
        f'#!/bin/bash\nif [ "$2" = pip ]; then echo "$@" >> {tmp_path}/calls; else exec {sys.executable} "$@"; fi\n'
    )
    (tmp_path / "python").chmod(0o755)
    root = tmp_path / "clone"
    (root / ".venv").mkdir(parents=True)
    (root / "launch").mkdir()
    shutil.copy(ROOT / "launch/lent.py", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    done = shell(f"ROOT={root} PYTHON={tmp_path}/python; install_megalite dev /lender", PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert f"--constraint {root}/.venv/lent.txt --requirement {root}/.venv/wanted.txt" in first
    assert second.endswith(f"--no-deps --editable {root}")


def test_a_missing_compiler_is_named(programs):
    done = shell(f"check_compiler {sys.executable}", PATH=programs.path)
    assert done.returncode == 2 and "no C++ compiler" in done.stderr and "apt install g++" in done.stderr
    programs("g++", "exit 0")
    assert shell(f"check_compiler {sys.executable}", PATH=programs.path).returncode == 0


def test_versions_for_machines_without_a_gpu_are_exact():
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.6.0" and pins["numpy"].startswith("2.3.")
