"""LoRA against PEFT on a transformers model, in every kind of layout: losses and gradients of sft and dpo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.generation.loading import load_model, open_checkpoint
from tests.adapter.support import BETA, PAIRS, SFT, load_peft, make_adapter, run_rank
from tests.align import peer
from tests.fixtures import golden
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


def test_every_matrix_of_latent_attention_takes_an_adapter(tmp_path: Path) -> None:
    """Also the projections down, which every tensor rank holds whole: PEFT's logits."""
    base, ids_BS = golden.folder("deepseek3_experts"), golden.golden("deepseek3_experts")["input_ids"]
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    with torch.no_grad():
        theirs = load_peft(base, adapter)(ids_BS).logits
        with open_checkpoint(adapter) as opened, load_model(opened, ()) as loaded:
            stage = loaded.model.stages[0]
            ours = stage.logits(stage(ids_BS, stage.positions(ids_BS.shape[1]))).transpose(0, 1)
    assert (ours - theirs).abs().max() < 2e-5
