"""Layers of the newer families, all their features in one model: every layout trains it as one process does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.parity import (
    Case,
    Layout,
    assert_trains_as_alone,
)

FIELDS: dict[str, Any] = {
    "model.block": "sandwich_norm",
    "model.feed_forward": "geglu",
    "model.qk_norm": True,
    "model.qk_norm_scope": "all_heads",
    "model.zero_centered_norm": True,
    "model.sliding_window": 4,
    "model.layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    "model.no_rope_layers": (2,),
    "model.rope_local_theta": 300.0,
    "model.attention_multiplier": 0.4,
    "model.attn_logit_softcapping": 1.5,
    "model.final_logit_softcapping": 2.0,
    "model.logits_scaling": 1.3,
    "model.embedding_multiplier": 6.0,
    "model.residual_multiplier": 0.7,
    "model.tie_embeddings": True,
    "train.z_loss": 1e-3,
}
REORDERED = FIELDS | {
    "model.block": "reordered_norm",
    "model.zero_centered_norm": False,
    "train.recompute": "selective",
}
"""Tensor ranks share the middle one of three key heads: its part of the norm over all keys counts once."""

LAYOUTS = [
    (FIELDS, Layout(tensor=2)),
    (FIELDS, Layout(tensor=2, sequence=True, pipeline=2)),
    (FIELDS, Layout(pipeline=2, schedule="zb_h1")),
    (REORDERED, Layout(tensor=2, sequence=True, data=2, zero=3)),
    (REORDERED, Layout(tensor=4, sequence=True)),
    (REORDERED, Layout(context=2, mode="ring")),
]


@pytest.mark.parametrize(("fields", "layout"), LAYOUTS, ids=[f"{f['model.block']}-{at.name}" for f, at in LAYOUTS])
def test_every_layout_trains_the_same(fields: dict[str, Any], layout: Layout) -> None:
    case = Case.of(fields, steps=4)
    assert_trains_as_alone(case, layout)
