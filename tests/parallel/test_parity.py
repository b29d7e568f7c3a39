"""Every layout of up to four processes trains the model that one process trains.

Pipelines and their schedules give the same bits; splitting tensors, sequences and data changes the order of sums only.
"""

import dataclasses

import pytest

from megalite.schedule.schedules import SCHEDULES
from tests.support.parity import (
    EVERYTHING,
    Case,
    Layout,
    assert_agree,
    assert_same_bits,
    layouts,
    train,
    train_alone,
    train_virtually,
)

ALL = list(layouts(4))

REPRESENTATIVE = [
    Layout(data=2),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2, schedule="interleaved"),
    Layout(pipeline=2, schedule="zb_v"),
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, sequence=True, pipeline=2),
    Layout(pipeline=2, data=2, zero=1),
    Layout(tensor=2, sequence=True, data=2, zero=1),
    Layout(data=2, zero=3),
]
"""The fast tier's."""


def case_for(layout, fields):
    """3 layers, or one more than the stages, so that stages differ; 4 samples a step, or 6 for 3 ranks."""
    stages = layout.pipeline * SCHEDULES[layout.schedule].least_chunks
    samples = 6 if 3 in (layout.pipeline, layout.data) else 4
    return Case.of({**fields, "model.layers": max(3, stages + 1), "train.global_batch_size": samples})


def marked(chosen, fast=()):
    return [
        pytest.param(layout, id=layout.name, marks=[pytest.mark.fast] if layout in fast else []) for layout in chosen
    ]


@pytest.fixture(scope="module")
def outcomes(pool):
    """Each layout trained once, for all tests of this file."""
    made = {}

    def outcome(layout, fields, chaos):
        key = (layout, chaos, str(fields))
        if key not in made:
            case = case_for(layout, fields)
            made[key] = train_virtually(case, layout, chaos) if chaos else train(pool, case, layout)
        return made[key]

    return outcome


def test_all_layouts_are_here():
    assert len(ALL) == len({layout.name for layout in ALL}) == 69
    assert set(REPRESENTATIVE) <= set(ALL)


@pytest.mark.parametrize("layout", marked(ALL))
def test_every_layout_trains_as_one_process(outcomes, layout):
    assert_agree(layout, outcomes(layout, {}, False), train_alone(case_for(layout, {})))


@pytest.mark.parametrize("layout", marked(ALL, REPRESENTATIVE))
def test_every_layout_with_every_option_among_late_and_poisoned_messages(outcomes, layout):
    ours = outcomes(layout, EVERYTHING, True)
    assert_agree(layout, ours, train_alone(case_for(layout, EVERYTHING)))


@pytest.mark.parametrize(
    "layout", marked([layout for layout in ALL if layout.data > 1 and layout.zero == 1], [Layout(data=2)])
)
def test_sharded_optimizer_gives_the_bits_of_the_plain_one(outcomes, layout):
    plain = dataclasses.replace(layout, zero=0)
    assert_same_bits(outcomes(layout, {}, False), outcomes(plain, {}, False))


@pytest.mark.parametrize("layout", marked([layout for layout in ALL if layout.zero == 3]))
def test_sharded_parameters_give_the_bits_of_sharded_gradients(outcomes, layout):
    assert_same_bits(outcomes(layout, {}, False), outcomes(dataclasses.replace(layout, zero=2), {}, False))


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("layout", [Layout(data=2), Layout(tensor=2, sequence=True, data=2)])
def test_one_micro_batch_gives_the_bits_of_the_sharded_optimizer(pool, layout, zero):
    """With several, ZeRO-2 and 3 add the ranks' gradients before those of the micro-batches.

    Of two ranks: they cut their buckets by layers, and the order in which three are summed depends on the cut.
    """
    case = Case.of({"train.global_batch_size": layout.data})
    assert_same_bits(train(pool, case, dataclasses.replace(layout, zero=zero)), train(pool, case, layout))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_sharded_parameters_are_there_when_layers_are_evaluated_again(pool, recompute):
    case = Case.of({**EVERYTHING, "train.recompute": recompute, "train.precision": "bf16"})
    sharded = train_virtually(case, Layout(data=2, zero=3), chaos=True)
    assert_same_bits(sharded, train(pool, case, Layout(data=2, zero=2)))
