"""The models that adapters are put on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.align import peer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peer.make_models(tmp_path_factory.mktemp("models"))[0]
