"""Put known errors into a copy of the code, one at a time, and see that the test which should notice does.

    python tools/mutate.py [NAME ...] [--list] [--sample N] [--seed S] [--file tests/mutations.toml]

A name is one of the file's, or a part of it; without one, all. Each error is a text that occurs once in a file, its
replacement, and a test. First the tests run on the unchanged copy, and must pass; then each with its error, and must
fail. A table follows. Exit code 0 if every error was noticed, 1 if one was not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from megalite.cli import Parser, file_path, program, whole
from megalite.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = ROOT / "tests" / "mutations.toml"
FAILED = 1
"""pytest's exit code where a test ran and failed; others mean that none ran."""
LIMIT_SECONDS = 600
PRELOADED = ("pytest", "numpy", "torch", "torch.utils.checkpoint", "torch.distributed.tensor", "spmd_types.checker")


@dataclass(frozen=True)
class Mutation:
    """An error: `old`, which occurs once in `file`, becomes `new`; `test` is then to fail. `why` is for people."""

    name: str
    why: str
    file: str
    old: str
    new: str
    test: str

    def put_into(self, root: Path) -> tuple[str, str]:
        """The text of the file in the tree at `root`, and the same with the error."""
        path = root / self.file
        text = path.read_text() if path.is_file() else ""
        if text.count(self.old) != 1 or self.old == self.new:
            raise UserError(
                f"mutation {self.name!r}: its old text occurs {text.count(self.old)} times in {self.file}, not once; "
                "write it anew for the code as it is"
            )
        return text, text.replace(self.old, self.new)


def read_mutations(path: Path) -> list[Mutation]:
    """All errors of a file. Raises `UserError`."""
    try:
        tables = tomllib.loads(path.read_text())["mutation"]
        return [Mutation(**table) for table in tables]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} holds no list of mutations: {error}") from None


def copy_tree(target: Path) -> None:
    """The code, its tests and what is compiled, with the kernels where an installation has them."""
    for name in ("megalite", "kernels", "tests", "tools", "launch", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, target / name)
    (target / "megalite" / "kernels").symlink_to("../kernels")


def preload() -> None:
    """Import what every test needs and no error touches: the processes that run them are forked from this one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # no thread but this one may live where it forks
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code in a process of its own, and its output."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _be_pytest(root, tests, output)
        code, limit = -1, time.monotonic() + LIMIT_SECONDS
        while code < 0 and time.monotonic() < limit:
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) % 256 if done else -1
            time.sleep(0.05)
        if code < 0:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return FAILED, f"E   no end after {LIMIT_SECONDS} s"
        output.seek(0)
        return code, output.read()


def _be_pytest(root: Path, tests: Sequence[str], output: TextIO) -> NoReturn:
    """Become a session of pytest in the tree at `root`, with nothing loaded of the tree this program is of."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.chdir(root)
    for name in [name for name in sys.modules if name.split(".")[0] in ("megalite", "tests", "tools")]:
        del sys.modules[name]
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tools")))]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    code = 70
    try:
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def reason(output: str) -> str:
    """The first line that pytest prints of what was wrong."""
    lines = re.findall(r"^E\s+(\S.*)$", output, re.MULTILINE)
    return lines[0] if lines else (output.strip().splitlines() or ["no output"])[-1]


def rows(root: Path, mutations: Sequence[Mutation]) -> Iterator[tuple[Mutation, str, float, str]]:
    """(error, `found`, `SURVIVED` or `NO TEST`, seconds, what the test said) of each."""
    for mutation in mutations:
        began = time.monotonic()
        right, wrong = mutation.put_into(root)
        (root / mutation.file).write_text(wrong)
        code, output = run_tests(root, [mutation.test])
        (root / mutation.file).write_text(right)
        verdict = {0: "SURVIVED", FAILED: "found"}.get(code, "NO TEST")
        yield mutation, verdict, time.monotonic() - began, reason(output)


def table(mutations: Sequence[Mutation]) -> list[str]:
    """Lines of Markdown, as docs/numerics.md has them."""
    cells = [f"| {mutation.name} | {mutation.why} | `{mutation.test}` |" for mutation in mutations]
    return ["| error | what goes wrong, and who had it | found by |", "|---|---|---|", *cells]


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="an error's name or a part of it (all)")
    add("--list", action="store_true", help="print them as a table, and run nothing")
    add("--sample", type=whole(), metavar="N", help="so many, drawn at random (all)")
    add("--seed", type=whole(0), default=0, metavar="S", help="of the draw (0)")
    add("--file", type=file_path, default=MUTATIONS, metavar="FILE", help="the errors (tests/mutations.toml)")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Mutation]:
    mutations = read_mutations(Path(options.file))
    for name in options.names:
        if not any(name in mutation.name for mutation in mutations):
            raise UserError(f"no mutation is called {name!r}; --list prints the names")
    if options.names:
        mutations = [m for m in mutations if any(name in m.name for name in options.names)]
    if options.sample:
        mutations = random.Random(options.seed).sample(mutations, min(options.sample, len(mutations)))
    return mutations


@program
def main() -> int:
    options = parse()
    mutations = chosen(options)
    if options.list:
        print("\n".join(table(mutations)))
        return 0
    if importlib.util.find_spec("pytest") is None:
        raise UserError("the tests need pytest; install megalite with its extra dev")
    for mutation in mutations:
        mutation.put_into(ROOT)
    preload()
    with tempfile.TemporaryDirectory(prefix="megalite-mutate-") as folder:
        root = Path(folder)
        copy_tree(root)
        code, output = run_tests(root, sorted({mutation.test for mutation in mutations}))
        if code:
            raise UserError(f"without any error put in, a test fails: {reason(output)}")
        found = 0
        for mutation, verdict, seconds, said in rows(root, mutations):
            found += verdict == "found"
            print(f"{verdict:8} {seconds:5.1f} s  {mutation.name}: {said[:100]}", flush=True)
    print(f"{found} of {len(mutations)} errors found")
    return 0 if found == len(mutations) else 1


if __name__ == "__main__":
    sys.exit(main())
