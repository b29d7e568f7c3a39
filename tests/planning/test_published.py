"""Memory and speed that others have published: how near the planner comes, and in which order it puts them."""

import dataclasses

import pytest

from benchmarks.planner import published_peers as peers
from benchmarks.planner.published import (
    LLAMA2_70B,
    LLAMA_13B,
    Point,
    memory_points,
    order_agreement,
    speed_points,
    titan_job,
)
from megalite.planning.hardware import DEVICES

pytestmark = pytest.mark.fast

NOT_MATCHED = {"torchtitan Llama 3 70B, FSDP 32, tensor 8"}
"""fp8 weights and scales beside the bf16 ones are not modelled: 12 % too low."""


@pytest.fixture(scope="module")
def speeds() -> list[Point]:
    return speed_points()


@pytest.mark.parametrize("point", memory_points(), ids=lambda point: point.name)
def test_published_memory(point):
    assert abs(point.error) < (0.13 if point.name in NOT_MATCHED else 0.10)


@pytest.mark.parametrize(
    "name, batch, recompute, fits",
    [
        ("13B", 2, "selective", True),
        ("70B", 2, "selective", False),
        ("70B", 1, "selective", True),
        ("70B", 2, "full", True),
    ],
)
def test_what_ran_out_of_memory_on_64_a100(name, batch, recompute, fits):
    """torchtitan's docs/performance.md of April 2024, FSDP 64, s 4096: the 70B model with batch 2 did not fit."""
    size = {"13B": LLAMA_13B, "70B": LLAMA2_70B}[name]
    job = titan_job(size, 64, 1, batch, recompute, seq_length=4096, device=DEVICES["a100"])
    assert (peers.torchtitan_memory(job, compiled_loss=False) < DEVICES["a100"].memory) == fits


@pytest.mark.parametrize(
    "group",
    [
        "schemes, 174.6 B",
        "schemes, 529.6 B",
        "nanotron, tensor size",
        "MT-NLG, copies",
        "Megatron 2021, sizes",
        "torchtitan 8B layouts",
    ],
)
def test_layouts_are_ordered_as_published(speeds, group):
    right, pairs = order_agreement([point for point in speeds if point.group == group])
    assert pairs > 0 and right == pairs


def test_speed_is_near_what_was_published(speeds):
    """Half of the points within a tenth; none but those explained in docs/planning.md further off than a fifth."""
    explained = ("MT-NLG", "Megatron H100")
    errors = sorted(abs(point.error) for point in speeds)
    assert errors[len(errors) // 2] < 0.10
    assert all(abs(point.error) < 0.2 for point in speeds if not point.name.startswith(explained))


def test_the_order_of_two_points_needs_both_predictions():
    points = [Point("a", "", 1.0, 1.0), Point("b", "", 2.0, 3.0), Point("c", "", 2.05, 0.5)]
    assert order_agreement(points) == (1, 2)  # b against c are too near; c is predicted below a
    assert order_agreement([dataclasses.replace(points[2], predicted=4.0), *points[:2]]) == (2, 2)
