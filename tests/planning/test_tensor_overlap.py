"""The planner's play of tensor-parallel communication is that of the trainer, collective by collective."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from benchmarks import scaling, tensor_overlap
from megalite.config.schema import AUTO_OVERLAP_SPLITS
from megalite.parallel.turns import Turns
from megalite.planning import DEVICES, tensor_time
from megalite.planning.job import MEGALITE
from megalite.planning.stage_time import layer_work
from megalite.planning.tensor_time import LayerCommunication, Queues, exposed
from megalite.planning.two_batches import two_batch_talk
from megalite.schedule.ops import Op
from tests.parallel.test_overlap import KEEPS, SPLITS, events_of
from tests.parallel.test_two_batch_overlap import PAIR, watched
from tests.support.parity import Layout
from tests.support.recording import Product, Start

pytestmark = pytest.mark.fast
H100 = DEVICES["h100"]


@pytest.mark.parametrize("cost", [0.0, 0.13, 0.3])
def test_one_collective_beside_one_product_costs_what_was_measured(cost):
    """A share of its own time where the product is longer; else all but what the product has hidden."""
    for _ in range(20):
        sent, product = random.uniform(0.1, 3.0), random.uniform(0.1, 3.0)
        queues = Queues(cost)
        number = queues.start(sent)
        queues.compute(product)
        queues.wait(number)
        assert queues.computed == product
        assert queues.exposed == pytest.approx(max(cost * sent, exposed(sent, product)))


def test_a_wait_is_for_all_before_it_and_for_none_after():
    queues = Queues(0.3)
    first, second = queues.start(2.0), queues.start(5.0)
    queues.wait(first)
    assert queues.now == 2.0
    queues.wait(first)
    queues.wait(second)
    queues.compute(1.0)
    assert (queues.now, queues.exposed) == (8.0, 7.0)


def replayed(operation, layout, fields, pieces, product, sent, attention):
    """Exposed seconds of an operation as the trainer runs it; all products take alike, and all collectives."""
    queues, numbers = Queues(MEGALITE.hiding_cost), {}
    rank = layout.tensor if layout.pipeline > 1 else 0  # of the middle stage, if there are several
    along, part = (rank, rank + 1), 2 * 32 // pieces  # rows of a piece: of two samples of 32 tokens
    forward, backward = attention
    for event in events_of(layout, rank, **fields, **{SPLITS: pieces}):
        if getattr(event, "during", None) != operation:
            continue
        if isinstance(event, Product):
            if len(event.shape) == 3:  # attention, written out in products
                queues.compute(backward / 4 if operation.kind == "B" else forward / 2)
            else:  # weight gradients are whole
                queues.compute(product / pieces if event.shape[0] == part else product)
        elif isinstance(event, Start):
            if event.group == along:
                numbers[event] = queues.start(sent)
        elif event.start in numbers:
            queues.wait(numbers[event.start])
    return queues.exposed


def alike(monkeypatch, product, sent):
    """The planner with such times."""
    monkeypatch.setattr(tensor_time, "matrix_seconds", lambda job, matrix, rows: product * rows / job.tokens)
    monkeypatch.setattr(tensor_time, "stream_exchange", lambda job, width=0, splits=1: sent)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("sent", [0.3, 1.0, 4.0])
def test_a_layer_is_played_as_the_trainer_runs_it(monkeypatch, pieces, sent, kept):
    """All products alike and all collectives alike; a layer in the midst of others is the difference of two stages."""
    product, attention = random.uniform(0.5, 2.0), (0.0, random.uniform(0.5, 5.0))
    alike(monkeypatch, product, sent)
    job = dataclasses.replace(scaling.tensor_job(H100, 4096, 2, splits=pieces), keep_gathered=kept)
    layout, times = Layout(tensor=2, sequence=True, pipeline=3), (pieces, product, sent, attention)

    def of_stage(kind, layers):
        fields = {"model.layers": 3 * layers, "train.global_batch_size": 8, KEEPS: kept}
        return replayed(Op(kind, 1, 1), layout, fields, *times)

    layer = LayerCommunication(job, attention[1])
    assert layer.forward() == pytest.approx(of_stage("F", 1))
    assert layer.backward() == pytest.approx(of_stage("B", 3) - of_stage("B", 2))


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("sent", [0.3, 1.0, 4.0])
def test_two_passes_are_played_as_the_trainer_runs_them(monkeypatch, pieces, sent):
    """A layer in the midst of others, of one of the two."""
    monkeypatch.setattr(Turns, "run", watched(Turns.run))
    product, attention = random.uniform(0.5, 2.0), (random.uniform(0.5, 5.0), 0.0)
    alike(monkeypatch, product, sent)
    job = dataclasses.replace(scaling.tensor_job(H100, 4096, 2, splits=pieces), two_batch_overlap=True)
    layout, times = Layout(tensor=2, sequence=True), (pieces, product, sent, attention)
    four, two = (replayed(Op("F", 0, 0), layout, PAIR | {"model.layers": layers}, *times) for layers in (4, 2))
    assert two_batch_talk(job, attention[0]) == pytest.approx(((four - two) / 4, 0.0))


@pytest.mark.parametrize("hidden", scaling.MODELS)
def test_pieces_help_until_their_starts_cost_more(hidden):
    shares = {splits: scaling.tensor_share(H100, hidden, 8, splits=splits)["share"] for splits in (1, 2, 3, 4, 16)}
    assert shares[AUTO_OVERLAP_SPLITS] > shares[1] + 0.04 and shares[16] < shares[AUTO_OVERLAP_SPLITS]
    assert shares[AUTO_OVERLAP_SPLITS] > max(shares.values()) - 0.002
    alone = scaling.tensor_job(H100, hidden, 1)
    assert layer_work(alone) == layer_work(dataclasses.replace(alone, overlap_splits=1))


def test_the_results_in_the_repository_are_those_of_this_code():
    kept = json.loads((Path(scaling.__file__).parent / "results" / "tensor_overlap.json").read_text())["tables"]
    made = tensor_overlap.tables()
    remedy = "run python benchmarks/tensor_overlap.py --output benchmarks/results/tensor_overlap.json"
    assert made.keys() == kept.keys(), remedy
    for title, rows in made.items():
        for mine, own in zip(rows, kept[title], strict=True):
            for name, cell in mine.items():
                same = cell == own[name] or cell == pytest.approx(own[name], rel=1e-6)
                assert same, f"{title}, {name}: {remedy}"
