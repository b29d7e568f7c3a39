"""Memory of real training on CPU processes, measured in benchmarks/planner/measure.py's way, beside the prediction."""

import sys

import pytest

from benchmarks.planner.measure import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc"),
]


@pytest.mark.parametrize(
    "name",
    [
        "1 process",
        "1 process, bf16",
        "1 process, full",
        "tensor 2",
        "pipeline 2",
        "data 2, ZeRO-0",
        "data 2, ZeRO-1",
        "data 2, ZeRO-3",
        "LoRA",
        "LoRA, bf16",
        "LoRA, tensor 2",
        "LoRA, data 2, ZeRO-3",
        "context 2, gather",
        "context 2, ring",
        "context 2, ulysses",
        "experts, data 2",
        "experts, expert 2",
    ],
)
def test_predicted_memory_is_what_a_rank_takes(name):
    point = measure(name)
    assert abs(point.error) < 0.10, f"{point.published:.0f} MiB measured, {point.predicted:.0f} predicted"
