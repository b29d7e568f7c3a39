"""The suite on several processes of pytest-xdist: each file in one of them, and all of SLURM, which has one cluster."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling


class ByFile(LoadFileScheduling):
    """Whole files, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


class Spread:
    """The plugin that names this scheduler; `pytest -n 2` uses it."""

    @pytest.hookimpl
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> ByFile:
        config.option.loadscopereorder = False
        return ByFile(config, log)
