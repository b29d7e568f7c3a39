"""Every program answers mistakes alike and ends alike: `megalite/cli.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.cli import Parser, number, whole
from megalite.errors import UserError

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tools").glob("*.py"))),
    "launch/slurm.py",
    "launch/quickstart.py",
    "launch/quickstart_answers.py",
    "launch/local.py",
    "megalite.train",
]
MISTYPED = {  # an option of each, one letter wrong; nothing else is given, though much is required
    "tools/chat.py": "--max-new-token",
    "tools/clean_data.py": "--ouput",
    "tools/compare.py": "--noise-run",
    "tools/convert_checkpoint.py": "--dtpe",
    "tools/dedup_data.py": "--treshold",
    "tools/doctor.py": "--time-limt",
    "tools/draw_schedule.py": "--micro_batches",
    "tools/evaluate.py": "--chekpoint",
    "tools/generate.py": "--max-new-token",
    "tools/inspect_checkpoint.py": "--verfy",
    "tools/inspect_data.py": "--seq-lenght",
    "tools/merge_data.py": "--output",
    "tools/mutate.py": "--sampel",
    "tools/plan.py": "--device-typ",
    "tools/preprocess_data.py": "--tokeniser-model",
    "tools/report.py": "--ouput",
    "tools/torture.py": "--fault",
    "tools/train_tokenizer.py": "--vocab_size",
    "launch/slurm.py": "--node",
    "launch/quickstart.py": "--proceses",
    "launch/quickstart_answers.py": "--promts",
    "launch/local.py": "--proceses",
    "megalite.train": "--chek",
}
COMPLETE = {"tools/doctor.py", "tools/mutate.py", "tools/torture.py", "launch/quickstart.py", "megalite.train"}
"""Those that need no argument."""


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, *(["-m"] if "/" not in program else []), program, *arguments]


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = os.environ | environment
    return subprocess.run(command(program, *arguments), cwd=ROOT, env=surroundings, capture_output=True, text=True)


def is_refusal(done: subprocess.CompletedProcess[str]) -> bool:
    one_line = done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return (done.returncode, done.stdout) == (2, "") and one_line


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_refuses_alike(program: str) -> None:
    recipe = ["launch/recipes/quickstart.toml"] if program == "launch/local.py" else []
    mistyped = run(program, *recipe, MISTYPED[program], "1")
    assert is_refusal(mistyped), mistyped
    assert "did you mean --" in mistyped.stderr and "required" not in mistyped.stderr
    unknown = run(program, *recipe, "--quux\nquux")
    assert is_refusal(unknown) and "--quux" in unknown.stderr, unknown
    if program not in COMPLETE and program != "launch/local.py":
        missing = run(program)
        assert is_refusal(missing), missing


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_every_output(program: str) -> None:
    """Into ASCII, and into a pipe that nobody reads."""
    plain = run(program, "--help", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert plain.returncode == 0 and "usage: " in plain.stdout and not plain.stderr
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(command(program, "--help"), cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.returncode in (0, 141) and not done.stderr


PROGRAM = """
import sys, time
from megalite.cli import program
from megalite.errors import UserError
@program
def main():
    {}
main()
"""


def ends(body: str, **options: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body)], cwd=ROOT, stderr=subprocess.PIPE, **options)
    return done.returncode, done.stderr.decode()


@pytest.mark.fast
def test_outputs_that_take_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        for body in ("print('x')", "print('x' * 10**6)", "print('x', flush=True)"):
            assert ends(body, stdout=writer) == (141, "")
        code, error = ends("import os; os.write(os.pipe()[1], b''); raise BrokenPipeError('own')", stdout=sys.stderr)
        assert code == 1 and "own" in error
    finally:
        os.close(writer)
    with open("/dev/full", "wb") as full:
        expected = "error: standard output cannot be written: No space left on device\n"
        assert ends("print('x')", stdout=full) == (2, expected)
    closed = subprocess.run(
        f'{sys.executable} -c "{PROGRAM.format("sys.stdout.write(chr(233))")}" >&-', shell=True, cwd=ROOT
    )
    assert closed.returncode == 0


@pytest.mark.fast
def test_interrupted() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format("print('ready', flush=True); time.sleep(60)")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "interrupted\n") and process.returncode == 130


def parser() -> Parser:
    result = Parser(None, overrides=lambda words: None)
    result.add_argument("--input", nargs="+", action="gather", default=("a",))
    result.add_argument("--needed", required=True, type=whole(0, 9))
    result.add_argument("--weight", type=number(-5))
    result.add_argument("--kind", choices=("first", "longest"))
    return result


@pytest.mark.fast
def test_what_a_command_line_means() -> None:
    line = "--a.b 1 --input x y --needed 3 --input z --c.d=-1 --weight -1e-3 -- --e.f 2"
    options = parser().parse_args(line.split(" "))
    assert options.input == ["x", "y", "z"] and " ".join(options.overrides) == "--a.b 1 --c.d=-1 --e.f 2"
    assert options.weight == -0.001 and parser().parse_args(["--needed", "0"]).input == ("a",)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: --needed; see --help"),
        ("--neded 3", "--neded is unknown; did you mean --needed?; see --help"),
        ("--need=3", "--need is unknown; did you mean --needed?"),
        ("--needed 10", "--needed: '10' is not a whole number from 0 to 9; see --help"),
        ("--needed " + "9" * 6000, "..."),
        ("--needed", "--needed: expected one argument"),
        ("--needed 1 --weight -inf", "--weight: '-inf' is not a number from -5 up"),
        ("--needed 1 --weight nan", "'nan' is not a number"),
        ("--needed 1 --kind longst", "'longst' is not one of first, longest; did you mean longest?"),
        ("--needed 1 stray", "unrecognized arguments: stray"),
        ("--needed 1 --odd", "--odd is unknown; did you mean --needed"),
    ],
)
def test_mistakes_on_a_command_line(line: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parser().parse_args(line.split())
    assert message in str(refused.value) and len(str(refused.value)) < 300
