"""LoRA against PEFT on a transformers model, in every kind of layout: losses and gradients of sft and dpo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.adapter.support import BETA, PAIRS, SFT, load_peft, make_adapter, run_rank
from tests.align import peer
from tests.support.parity import Layout, assemble, distance

pytest.importorskip("peft")

LAYOUTS = (
    Layout(),
    pytest.param(Layout(tensor=2, sequence=True), marks=pytest.mark.slow),
    pytest.param(Layout(pipeline=2), marks=pytest.mark.slow),
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True, pipeline=2),
)


def expected(base: Path, adapter: Path) -> dict[str, tuple[float, dict[str, Tensor]]]:
    model = load_peft(base, adapter)
    found = {"sft": peer.sft(model, SFT), "dpo": peer.dpo(model, peer.load(base), PAIRS, BETA)}
    names = ("base_model.model.", ""), (".default", "")
    for name, (loss, gradients) in found.items():
        for old, new in names:
            gradients = {key.replace(old, new): value for key, value in gradients.items()}
        found[name] = loss, gradients
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_losses_and_gradients(pool: Any, base: Path, tmp_path: Path, layout: Layout) -> None:
    kind = "rslora" if layout.pipeline == 2 else "lora"
    adapter = make_adapter(base, tmp_path / "adapter", kind == "rslora")
    theirs = expected(base, adapter)
    ranks = pool.run(run_rank, layout.world, layout, base, adapter, kind, tmp_path)
    for name, (loss, gradients) in theirs.items():
        assert all(rank[name][0] == ranks[0][name][0] for rank in ranks)
        assert math.isclose(ranks[0][name][0], loss, rel_tol=1e-5)
        ours = assemble([rank[name][1] for rank in ranks], 1)
        assert ours.keys() == gradients.keys() and len(ours) == 2 * 7 * 4
        far = {key: gap for key in ours if not (gap := distance(ours[key], gradients[key])) <= 1e-5}
        assert not far
