"""The kernels' own tests, the same for both ways to run a kernel.

In a process with TRITON_INTERPRET=1 (which `tests/kernels/test_interpreter.py` starts) they run on the CPU; on a
machine with a CUDA device `pytest -m gpu` runs them natively. In any other process they are skipped.
"""

import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

if INTERPRETED:
    from tests.kernels.interpreter_bf16 import correct_bf16

    correct_bf16()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """New random numbers every time; MEGALITE_TEST_SEED repeats a failure."""
    seed = int(os.environ.get("MEGALITE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"MEGALITE_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised float memory is NaN: what a kernel forgets to write, or reads beyond its input, is seen."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() and made.device.type != "meta" else made

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
