"""Requirements for pip to install beside a torch borrowed from another environment: launch/lent.py FOLDER [EXTRA]

Leaves FOLDER/wanted.txt, megalite's requirements without torch (and without a triton that imports), and
FOLDER/lent.txt, the exact versions of what must stay as it is. A vendor's build (2.11.0a0+…, or one that was installed
from a file) is known to no registry, and pip would put another one in its place. Needs no library.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

LENT = ("torch", "triton", "numpy")


def wanted(extra: str) -> list[str]:
    """Requirements of pyproject.toml, with those of an extra, that the lender does not see to."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = {"torch", "triton"} if importlib.util.find_spec("triton") else {"torch"}
    requirements = project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])
    return [line for line in requirements if re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() not in given]


def lent() -> list[str]:
    """`name==version` of the installed packages."""
    lines = []
    for name in LENT:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name}=={importlib.metadata.version(name)}")
    return lines


def main(folder: Path, extra: str = "") -> None:
    for name, lines in (("wanted.txt", wanted(extra)), ("lent.txt", lent())):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
