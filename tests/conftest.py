"""Fixtures of the whole suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo workers: `pool.run(function, world_size, *args)` calls `function(rank, *args)` on each rank."""
    workers = Pool(4)
    yield workers
    workers.close()


FIRST = (
    "tests/slurm/",
    "tests/kernels/test_interpreter.py",
    "tests/kernels/test_gpu_session.py",
    "tests/train/",
    "tests/test_extending.py",
)
"""What takes longest by itself: begun last, it would leave the other processes idle at the end."""


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        from tests.support.spread import Spread

        config.pluginmanager.register(Spread())
    torch.set_num_threads(1)  # the same in every process: sums must not depend on how they were threaded


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files with such tests are imported: a GPU machine need not have what the others want."""
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    here = any(file.parent.name == "suite" or "mark.gpu" in file.read_text() for file in files)
    return None if here else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; tests that need a GPU say so in the summary where there is none."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
