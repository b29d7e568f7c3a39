"""launch/slurm.py: the scripts that it writes, and what it refuses. No SLURM is needed; tests/slurm has one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from megalite.errors import UserError
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"
GOLDEN = Path(__file__).parent / "golden"

CASES = {
    "llama3-8b-64gpu": "--nodes 8 --time 24:00:00 --partition gpu --account lab --exclusive --python /opt/python",
    "llama3-70b-pyxis": "--nodes 32 --time 2-00:00:00 --cpus-per-task 12 --mem 0 --qos high --constraint 'h100&ib' "
    "--exclude n[1-3] --reservation big --ifname ib0 --env NCCL_IB_HCA=mlx5 --env 'NOTE=two words' "
    "--extra-sbatch=--mail-type=END --extra-srun=--export=ALL --container-image nvcr.io#nvidia/pytorch:26.01-py3 "
    "--container-mounts /data:/data --signal-seconds 900 --max-requeues 5 "
    "-- --optimizer.lr 1e-4 --run.dir=/scratch/70b",
    "1b-apptainer-chain": "--nodes 1 --gpus-per-node 4 --chain 3 --container-image /images/torch.sif --no-preflight "
    '--master-addr head.cluster --master-port 31000 -- --data.train \'["a b", "c"]\'',
    "quickstart-cpu": "--nodes 2 --gpus-per-node 0 --tasks-per-node 2 --cpus-per-task 4 --python python3.12 "
    "--no-preflight -- --model.vocab_size 4096",
}
RECIPE_OF = {"llama3-70b-pyxis": "llama3-70b-256gpu", "1b-apptainer-chain": "1b", "quickstart-cpu": "quickstart"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test submits from a directory of its own, without an environment that would be taken over."""
    monkeypatch.chdir(tmp_path)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)


def run(arguments, capsys):
    """(exit code, standard output, standard error) of the program."""
    try:
        code = slurm.main(shlex.split(arguments))
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def script(name, capsys):
    recipe = RECIPES / f"{RECIPE_OF.get(name, name)}.toml"
    code, output, errors = run(f"--recipe {recipe} --dry-run {CASES[name]}", capsys)
    assert (code, errors) == (0, "")
    return output


def settings(text):
    """What stands above the part that every script has in common."""
    body = (ROOT / "launch" / "job.sh").read_text()
    assert text.endswith(body)
    head = text.removesuffix(body).replace(str(Path.cwd()), "/home/user").replace(str(ROOT), "/home/user/megalite")
    return re.sub(r"megalite [\w.+-]+$", "megalite COMMIT", head, flags=re.M)


@pytest.mark.parametrize("name", CASES)
def test_golden_script(name, capsys):
    """`MEGALITE_WRITE_GOLDEN=1 pytest tests/launch/test_slurm.py` writes the texts anew; read the difference."""
    text, path = settings(script(name, capsys)), GOLDEN / f"{name}.sbatch"
    if os.environ.get("MEGALITE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_a_dry_run_touches_nothing(capsys, tmp_path):
    for name in CASES:
        script(name, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_correct_shell(name, capsys, tmp_path):
    (tmp_path / "job.sbatch").write_text(script(name, capsys))
    files = [str(tmp_path / "job.sbatch"), str(ROOT / "launch/entry.sh")]
    for file in files:
        subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian and Ubuntu: apt install shellcheck)")
    checked = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_no_library_is_needed(tmp_path):
    """A login node's Python, without site-packages and without this environment."""
    command = [sys.executable, "-I", "-S", ROOT / "launch/slurm.py", "--recipe", RECIPES / "1b.toml", "--nodes", "2"]
    done = subprocess.run([*map(str, command), "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("#!/usr/bin/env bash\n"), done.stderr


def test_a_sweep_is_a_run_for_each_combination(capsys):
    code, output, _ = run(
        f"--recipe {RECIPES}/1b.toml --nodes 1 --dry-run --sweep optimizer.lr=1e-4,3e-4 --sweep model.kv_heads=4,8,16 "
        "-- --run.dir sweeps/a",
        capsys,
    )
    assert code == 0
    found = re.findall(r"^RUN=.*/(sweeps/\S+)$", output, flags=re.M)
    assert found == [f"sweeps/a-lr-{lr}-kv_heads-{heads}" for lr in ("1e-4", "3e-4") for heads in (4, 8, 16)]
    recipes = re.findall(r"^RECIPE=\(([^)]*)\)$", output, flags=re.M)
    assert [" ".join(recipe.split()[3:]) for recipe in recipes] == [
        f"--optimizer.lr {lr} --model.kv_heads {heads}" for lr in ("1e-4", "3e-4") for heads in (4, 8, 16)
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [("1,2", ["1", "2"]), ("[1, 2],[3]", ["[1, 2]", "[3]"]), ("'a,b', c", ["'a,b'", "c"]), ("1", ["1"])],
)
def test_values_of_a_sweep(text, values):
    assert slurm.split_values(text) == values


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("2-12", 216000), ("1-1:30", 91800), ("1-0:0:1", 86401)],
)
def test_times(time, seconds):
    assert slurm.seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 0", "'0' is not a whole number from 1 to 65535"),
        ("--nodes two", "'two' is not a whole number"),
        ("--nodes 1 --gpus-per-node -1", "'-1' is not a whole number from 0"),
        ("--nodes 1 --tasks-per-node 4", "--tasks-per-node 4: one rank runs on each of --gpus-per-node 8"),
        ("--nodes 1 --wall 3", "'--wall' is not understood"),
        ("--nodes 1 --dry-run --test-only", "not allowed with"),
        ("--nodes 1 --time tomorrow", "--time tomorrow is not a time"),
        ("--nodes 1 --time 5", "--time 5 leaves nothing beside --signal-seconds 300"),
        ("--nodes 1 --env PATH", "--env PATH is not NAME=VALUE"),
        ("--nodes 1 --env 1A=2", "--env 1A=2 is not NAME=VALUE"),
        ("--nodes 1 --partition 'a\nb'", "--partition = 'a\\nb' holds '\\n', which cannot stand"),
        ("--nodes 1 --partition ''", "--partition is empty"),
        ("--nodes 1 -- --run.dir 'a\\b'", "holds a backslash"),
        ("--nodes 1 --container-image i -- --run.dir a:b", "a colon or comma"),
        ("--nodes 1 --setup nowhere.sh", "--setup nowhere.sh does not exist"),
        ("--nodes 1 --container-mounts /a:/b", "--container-mounts is given without --container-image"),
        ("--nodes 1 --sweep lr=1", "--sweep lr=1 is not understood"),
        ("--nodes 1 --sweep optimizer.lr=1,,2", "--sweep optimizer.lr=1,,2 is not understood"),
        ("--nodes 1 --sweep optimizer.lr=1,1", "--sweep optimizer.lr=1,1 names a value twice"),
        ("--nodes 1 --master-port 80", "'80' is not a whole number from 1024"),
        ("--nodes 1 -- --lr 3", "'--lr' is not understood"),
        ("--nodes 1 -- --train.steps", "--train.steps has no value"),
        ("--nodes 1 -- --train.stepz 3", "did you mean"),
        ("--nodes 1 -- --parallel.tensor 3", "parallel.tensor = 3"),
    ],
)
def test_refusals_are_one_line(arguments, message, capsys):
    code, output, errors = run(
        f"--recipe {RECIPES}/1b.toml --dry-run {arguments}".replace("--dry-run --nodes", "--nodes"), capsys
    )
    assert code == 2 and output == ""
    assert message in errors and errors.count("\n") == 1 and errors.startswith("error: ")


def test_recipes_that_cannot_be_read(capsys, tmp_path):
    (tmp_path / "bad.toml").write_text("[run\n")
    for name, message in (("none.toml", "does not exist; see launch/recipes"), ("bad.toml", "cannot be read")):
        code, _, errors = run(f"--recipe {name} --nodes 1", capsys)
        assert code == 2 and message in errors and errors.count("\n") == 1


# The task that runs a rank


def run_rank(rank, ends_with, outcome):
    """launch/entry.sh as srun starts it, for a rank whose command is a line of shell."""
    place = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n0"}
    place |= {"MEGALITE_OUTCOME": str(outcome), "MASTER_ADDR": "n0", "MASTER_PORT": "1"}
    command = ["bash", str(ROOT / "launch/entry.sh"), "bash", "-c", ends_with]
    return subprocess.run(
        command, env=os.environ | place, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )


@pytest.mark.parametrize(
    ("ends_with", "code", "outcome", "says"),
    [
        ("exit 0", 0, None, ""),
        ("exit 75", 0, "75", ""),
        ("exit 2", 2, "2", ""),
        ("exit 5", 5, "5", "error: rank 0 on n0 ended with code 5"),
        ("kill -KILL $$", 137, "137", "error: rank 0 on n0 was ended by SIGKILL"),
        ("kill -USR1 $$ $PPID; exit 7", 7, "7", "error: rank 0 on n0 ended with code 7"),
        ("trap 'exit 75' TERM; kill -TERM $$ $PPID; sleep 9", 0, "75", ""),
    ],
)
def test_what_becomes_of_a_ranks_exit_code(tmp_path, ends_with, code, outcome, says):
    path = tmp_path / "outcome"
    done = run_rank("0", ends_with, path)
    assert done.returncode == code and says in done.stderr
    assert ("error: rank" in done.stderr) == bool(says)
    assert (path.read_text().strip() if path.exists() else None) == outcome


def test_the_first_rank_that_fails_gives_the_code(tmp_path):
    """SLURM then kills the others, and srun would tell their code, which is higher."""
    path = tmp_path / "outcome"
    for rank, ends_with in (("1", "exit 5"), ("0", "kill -TERM $$")):
        run_rank(rank, ends_with, path)
    assert path.read_text() == "5\n"


# Submitting, with a stand-in for sbatch


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An sbatch that notes its arguments and answers as the real one; `refuse` makes it say no."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(f"""#!/bin/bash
if [ -e {folder}/refuse ]; then echo "sbatch: error: invalid partition specified: x" >&2; exit 1; fi
echo "$*" >> {folder}/calls
echo "$((40 + $(wc -l < {folder}/calls)));cluster"
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_submission_keeps_script_and_recipe(sbatch, capsys, tmp_path):
    arguments = f"--recipe {RECIPES}/1b.toml --nodes 1 -- --run.dir out"
    for number in ("001", "002"):
        code, output, _ = run(arguments, capsys)
        assert code == 0 and f"{tmp_path}/out/launch/{number}.sbatch" in output
        assert (tmp_path / f"out/launch/{number}.toml").read_bytes() == (RECIPES / "1b.toml").read_bytes()
        assert f"SUBMISSION={tmp_path}/out/launch/{number}\n" in (tmp_path / f"out/launch/{number}.sbatch").read_text()
    assert len(list((tmp_path / "out/launch").iterdir())) == 4


def test_a_chain_is_in_order(sbatch, capsys):
    code, output, _ = run(f"--recipe {RECIPES}/1b.toml --nodes 1 --chain 3 --dependency afterok:7", capsys)
    assert code == 0 and output.startswith("job 41 then 42 then 43: ")
    order = re.findall(r"--dependency=(\S+)", (sbatch / "calls").read_text())
    assert order == ["afterok:7", "afterany:41", "afterany:42"]


def test_a_refused_submission_leaves_no_files(sbatch, capsys, tmp_path):
    (sbatch / "refuse").touch()
    code, _, errors = run(f"--recipe {RECIPES}/1b.toml --nodes 1 --partition x -- --run.dir out", capsys)
    assert (code, errors) == (2, "error: sbatch refuses the job: invalid partition specified: x\n")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_without_sbatch(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = run(f"--recipe {RECIPES}/1b.toml --nodes 1 -- --run.dir out", capsys)
    assert code == 2 and "sbatch is not on the path" in errors and errors.count("\n") == 1


def test_pair_overrides_know_both_spellings():
    assert slurm.pair_overrides(["--train.seq-length", "5", "--run.dir=a=b"]) == [
        ("train.seq_length", "5"),
        ("run.dir", "a=b"),
    ]
    with pytest.raises(UserError):
        slurm.pair_overrides(["train.steps", "5"])
