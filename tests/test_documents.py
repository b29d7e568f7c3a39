"""What the documents say about the tree is true: links, named files, modules and classes, and who imports what."""

import ast
import functools
import graphlib
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
TOP = ("megalite", "kernels", "tools", "launch", "tests", "docs", "benchmarks")
SOURCES = (".py", ".sh", ".cpp", ".h", ".md", ".toml", ".html")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./*-]*")
FILE = re.compile(r"`(?:[\w-]+/)*[\w-]+\.(?:py|sh|cpp|h|md)`")
MODULE = re.compile(r"\bmegalite(?:\.[A-Za-z_]\w*)+")
CLASS = re.compile(r"`([A-Z]\w*[a-z]\w*)(?:\.(\w+))?(?:\(.*?\))?`")
ELSEWHERE = {"cluster.sh", "PROGRAM.py", "helpers.cpp", "tools/checkpoint/convert.py"}
"""Files of the user's or of Megatron-LM."""


@functools.cache
def tracked() -> frozenset[str]:
    """Files of the repository and the folders that hold them, as paths from its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return frozenset(str(p) for name in files if name for p in (Path(name), *Path(name).parents))


def documents() -> list[str]:
    return sorted(name for name in tracked() if name.endswith(".md") and name.split("/")[0] != ".venv")


def anchors(name: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def is_known(path: str) -> bool:
    path = path.rstrip("/.")
    if "*" in path:
        return any(fnmatch(name, path) for name in tracked())
    return path in tracked() or (Path(path).suffix not in SOURCES and Path(path).suffix != "")


def module_text(dotted: str) -> tuple[str, list[str]] | None:
    """The source of the longest module that begins the dotted name, and the names after it."""
    parts = dotted.split(".")
    parts = parts[1:] if parts[:2] == ["megalite", "kernels"] else parts
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[:end])
        for file in (f"{stem}.py", f"{stem}/__init__.py"):
            if file in tracked():
                return (ROOT / file).read_text(), parts[end:]
    return None


@functools.cache
def code() -> str:
    names = (name for name in tracked() if name.endswith(".py") and name.split("/")[0] in TOP)
    return "\n".join((ROOT / name).read_text() for name in sorted(names))


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name):
    for target in LINK.findall(CODE.sub("", (ROOT / name).read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
        assert str(file.relative_to(ROOT)) in tracked(), f"{name}: {target} is not there"
        assert not anchor or anchor in anchors(str(file.relative_to(ROOT))), f"{name}: {target} has no such heading"


@pytest.mark.parametrize("name", documents())
def test_named_files_and_modules_exist(name):
    for span in CODE.findall((ROOT / name).read_text()):
        for path in PATH.findall(span):
            assert path in ELSEWHERE or is_known(path), f"{name}: {path} is not there"
        for file in FILE.findall(span):
            file = file.strip("`")
            known = file in ELSEWHERE or any(f"/{path}".endswith(f"/{file}") for path in tracked())
            assert known, f"{name}: no file is called {file}"
        for dotted in MODULE.findall(span):
            text, names = module_text(dotted) or ("", ["module"])
            missing = [word for word in names if not re.search(rf"\b{word}\b", text)]
            assert not missing, f"{name}: {dotted} is not there"


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_classes_exist(name):
    for span in CODE.findall((ROOT / name).read_text()):
        for owner, member in CLASS.findall(span):
            for word in filter(None, (owner, member)):
                assert re.search(rf"\b{word}\b", code()), f"{name}: nothing is called {word}"


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_architecture_lists_who_calls_torch_distributed():
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.split("## Who calls torch.distributed")[1].split("\n## ")[0]
    callers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megalite").rglob("*.py")
        if "torch.distributed" in imports(path) or '"torch.distributed"' in path.read_text()
    }
    assert set(re.findall(r"`(megalite/[\w/]+\.py)`", section)) == callers


def test_packages_import_in_no_circle():
    needs: dict[str, set[str]] = {}
    for path in (ROOT / "megalite").rglob("*.py"):
        package = path.relative_to(ROOT / "megalite").with_suffix("").parts[0]
        inside = {name.split(".")[1] for name in imports(path) if name.startswith("megalite.")}
        needs.setdefault(package, set()).update(inside - {package})
    graphlib.TopologicalSorter(needs).prepare()  # raises a CycleError that names the packages
