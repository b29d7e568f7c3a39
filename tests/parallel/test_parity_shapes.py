"""Sizes that divide nothing, and every option that changes the arithmetic, split and not: the same model comes out.

All runs here are on groups that answer late and poison their buffers.
"""

import pytest
import torch

from tests.support.parity import (
    EVERYTHING,
    Case,
    Layout,
    assert_same_bits,
    assert_trains_as_alone,
    distance,
    train_alone,
    train_virtually,
)

T2, T2S, T4, T4S = Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(tensor=4), Layout(tensor=4, sequence=True)
P2, P3, D2, D4 = Layout(pipeline=2), Layout(pipeline=3), Layout(data=2), Layout(data=4)
INTERLEAVED = Layout(pipeline=2, schedule="interleaved")
T2SP2, P2D2, T2SD2 = (
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(pipeline=2, data=2),
    Layout(tensor=2, sequence=True, data=2),
)
FOUR_STEPS = {"steps": 4}


def grid(*rows):
    """(name, fields, layouts, index of the one in the fast tier or None) -> parameters."""
    return [
        pytest.param(fields, layout, id=f"{name}-{layout.name}", marks=[pytest.mark.fast] if index == fast else [])
        for name, fields, chosen, fast in rows
        for index, layout in enumerate(chosen)
    ]


HEADS = grid(
    ("6_query_3_kv", {"model.heads": 6, "model.kv_heads": 3}, [T2, T2S], 1),
    ("6_query_3_kv_biased", {"model.heads": 6, "model.kv_heads": 3, "model.attention_bias": True}, [T2SD2], None),
    ("12_query_3_kv_chain", {"model.qk_norm": True, "model.attention_bias": True}, [T4, T4S], None),
    ("multi_query", {"model.heads": 8, "model.kv_heads": 1, "model.attention_bias": True}, [T2S, T4S], None),
    ("multi_head", {"model.heads": 4, "model.kv_heads": 4}, [T4S], None),
)


@pytest.mark.parametrize(("fields", "layout"), HEADS)
def test_heads_that_ranks_share(fields, layout):
    assert_trains_as_alone(Case.of(fields), layout)


TIED = {"model.tie_embeddings": True}
VOCABULARIES = grid(
    ("3_tokens", {"model.vocab_size": 3}, [T2S, T4S], None),
    ("5_tokens", {"model.vocab_size": 5}, [T2, T4, T4S], None),
    ("5_tokens_tied", {"model.vocab_size": 5, **TIED}, [T4S, T2SP2], 1),
    ("37_tokens_tied", TIED, [T4, P3, P2D2], None),
)


@pytest.mark.parametrize(("fields", "layout"), VOCABULARIES)
def test_vocabularies_that_do_not_divide(fields, layout):
    """5 tokens on 4 ranks are 2, 2, 1 and 0; 3 tokens leave one rank of 4 none."""
    assert_trains_as_alone(Case.of(fields), layout)


@pytest.mark.parametrize(
    ("fields", "layout"),
    grid(
        ("11_tokens", {"train.seq_length": 11}, [T2, P2, D2], None),
        ("1_token", {"train.seq_length": 1}, [P2], None),
        ("14_tokens", {"train.seq_length": 14}, [T2SP2], None),
    ),
)
def test_odd_sequences(fields, layout):
    assert_trains_as_alone(Case.of(fields, **FOUR_STEPS), layout)


@pytest.mark.parametrize(
    ("fields", "layout"),
    grid(
        ("5_layers", {"model.layers": 5}, [Layout(pipeline=4), INTERLEAVED], None),
        (
            "micro_batches_of_3",
            {"train.micro_batch_size": 3, "train.global_batch_size": 12},
            [P2, Layout(tensor=2, data=2), D4],
            None,
        ),
        ("1_micro_batch", {"train.global_batch_size": 1}, [P3, T2SP2], None),
    ),
)
def test_odd_depths_and_batches(fields, layout):
    assert_trains_as_alone(Case.of(fields, **FOUR_STEPS), layout)


@pytest.mark.parametrize("layout", [T2SP2, P3, D2, INTERLEAVED], ids=lambda layout: layout.name)
def test_documents_that_restart_positions(layout):
    case = Case.of({"model.layers": 5}, documents=True, steps=4)
    assert_trains_as_alone(case, layout)


def test_documents_matter():
    """The guard of the test above: the mask changes the outcome."""
    masked, plain = (train_alone(Case.of(documents=documents, steps=1)) for documents in (True, False))
    assert abs(masked.losses[0] - plain.losses[0]) > 1e-5


@pytest.mark.parametrize("layout", [Layout(), T2SP2, P2D2, T2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(recompute, layout):
    """Against the same layout that keeps everything: the same bits."""
    case = Case.of(EVERYTHING, **FOUR_STEPS)
    again = case.having({"train.recompute": recompute})
    if layout.world == 1:
        assert_same_bits(train_alone(again), train_alone(case))
    else:
        assert_same_bits(train_virtually(again, layout, chaos=True), train_virtually(case, layout, chaos=True))


@pytest.mark.parametrize("layout", [D2, P2D2, INTERLEAVED, T2SP2], ids=lambda layout: layout.name)
def test_growing_batches(layout):
    """4, 8, then 12 samples a step: the number of micro-batches changes under way."""
    case = Case.of({"train.batch_ramp": (4, 4, 24), "train.global_batch_size": 12, "model.layers": 5})
    assert [case.config(1).batch_size_at(samples) for samples in (0, 11, 12, 23, 24)] == [4, 4, 8, 8, 12]
    assert_trains_as_alone(case, layout)


@pytest.mark.parametrize(
    "layout", [P2, Layout(pipeline=3, schedule="gpipe"), INTERLEAVED], ids=lambda layout: layout.name
)
def test_bf16_pipelines_give_the_same_bits(layout):
    assert_trains_as_alone(Case.of({**EVERYTHING, "model.layers": 5, "train.precision": "bf16"}, **FOUR_STEPS), layout)


@pytest.mark.parametrize("layout", [T2, T2S, D2, T2SP2], ids=lambda layout: layout.name)
def test_bf16_layouts_are_as_near_to_fp32_as_one_process(layout):
    """bf16 keeps 8 bits; sums rounded in another order err in another way, but not by more."""
    case = Case.of(EVERYTHING, **FOUR_STEPS)
    half = case.having({"train.precision": "bf16"})
    ours, alone, exact = train_virtually(half, layout, chaos=True), train_alone(half), train_alone(case)
    for name, value in exact.gradients.items():
        assert distance(ours.gradients[name], value) < 2 * distance(alone.gradients[name], value) + 0.005, name
    # All weights as one: in a key's bias, whose gradient is almost zero, Adam makes whole steps of rounding noise.
    ends = [torch.cat([value.flatten() for value in outcome.weights.values()]) for outcome in (ours, alone, exact)]
    assert distance(ends[0], ends[2]) < 2 * distance(ends[1], ends[2]) + 0.001
    torch.testing.assert_close(ours.losses, exact.losses, rtol=2e-3, atol=0.0)


def test_bf16_sharded_optimizer_gives_the_bits_of_the_plain_one():
    case = Case.of({**EVERYTHING, "train.precision": "bf16"}, **FOUR_STEPS)
    plain = Layout(pipeline=2, data=2, zero=0)
    assert_same_bits(train_virtually(case, P2D2, chaos=True), train_virtually(case, plain, chaos=True))
