"""The errors of `tests/mutations.toml` fit the code as it is, docs/numerics.md has them, and tests notice them."""

from __future__ import annotations

import ast
import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.mutate import MUTATIONS, ROOT, read_mutations, table

DOCUMENT = ROOT / "docs" / "numerics.md"
DECIDES = re.compile(r"`((?:megalite|kernels)/[\w/]+\.py)` `([\w.]+)`|; `(\w+(?:\.\w+)?)`:")


@pytest.mark.fast
@pytest.mark.parametrize("mutation", read_mutations(MUTATIONS), ids=lambda mutation: mutation.name)
def test_an_error_can_be_put_into_the_code(mutation):
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1, f"occurs {text.count(mutation.old)} times in {mutation.file}"
    assert mutation.new != mutation.old
    if mutation.file.endswith(".py"):
        ast.parse(text.replace(mutation.old, mutation.new))
    path, _, name = mutation.test.partition("::")
    assert re.search(rf"^def {name.split('[')[0]}\b", (ROOT / path).read_text(), re.MULTILINE), mutation.test


@pytest.mark.fast
def test_the_document_has_them_all():
    section = DOCUMENT.read_text().split("## Errors that others had")[1]
    told = [line for line in section.splitlines() if line.startswith("|")]
    assert told == table(read_mutations(MUTATIONS)), "print it anew with `python tools/mutate.py --list`"


@pytest.mark.fast
def test_functions_that_decide_exist():
    section = DOCUMENT.read_text().split("## Where bits come from")[1].split("\n## ")[0]
    found = 0
    for line in section.splitlines():
        file = ""
        for path, name, again in DECIDES.findall(line):
            file = path or file
            owner, _, member = (name or again).rpartition(".")
            tree = ast.parse((ROOT / file).read_text())
            if owner:
                tree = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert member in names, f"{file} has no {name or again}"
            found += 1
    assert found >= 20


@pytest.mark.slow
def test_a_sample_is_noticed():
    """Another one every day."""
    seed = datetime.date.today().toordinal()
    command = [sys.executable, "tools/mutate.py", "--sample", "8", "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}{done.stderr}"


def test_an_error_that_is_not_noticed_is_told(tmp_path: Path):
    """A mutation that changes nothing, and one whose text is gone."""
    harmless = tmp_path / "mutations.toml"
    entry = '[[mutation]]\nname = "harmless"\nwhy = "none"\nfile = "megalite/files.py"\n'
    test = 'test = "tests/test_errors.py"\n'
    harmless.write_text(entry + 'old = "from __future__ import annotations"\nnew = "# none"\n' + test)
    command = [sys.executable, "tools/mutate.py", "--file", str(harmless)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "SURVIVED" in done.stdout, done.stdout + done.stderr
    harmless.write_text(entry + 'old = "no such text"\nnew = "x"\n' + test)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "occurs 0 times in megalite/files.py" in done.stderr, done.stdout + done.stderr
