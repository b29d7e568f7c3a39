"""LoRA in every kind of layout: gradients, updates, the frozen weights, precision, memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.parity import Case, Layout, assert_close, train, train_alone

FIELDS: dict[str, Any] = {
    "adapter.kind": "lora",
    "adapter.rank": 3,
    "adapter.alpha": 5.0,
    "model.layers": 4,
    "train.global_batch_size": 8,
}
LAYOUTS = (
    Layout(tensor=2),
    Layout(tensor=2, sequence=True, pipeline=2, schedule="zb_h1"),
    Layout(tensor=4, sequence=True),
    Layout(pipeline=2, schedule="interleaved", data=2, zero=3),
    Layout(data=2, zero=0),
    Layout(context=2, mode="ring", data=2, zero=2),
)


def case_of(**fields: Any) -> Case:
    return Case.of(FIELDS | fields, steps=3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gradients_and_updates_in_every_kind_of_layout(pool: Any, layout: Layout) -> None:
    case = case_of()
    assert_close(train(pool, case, layout, chaos=True), train_alone(case))
