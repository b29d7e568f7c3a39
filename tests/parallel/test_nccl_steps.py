"""Whole training steps of all ranks of a job under NCCL's rules: the count of units, the engine with its layers'
communications, reductions, the sums that all agree on, the optimizer and its gathers.

Every rank is recorded over its construction and two steps while all train together in this process, and the records
are played against each other (`tests.support.nccl`): no job may stand still or mix messages up.
"""

import contextlib

import pytest
import torch

from megalite.data.batch import Batch
from megalite.mesh import Mesh
from megalite.objective.next_token import NEXT_TOKEN
from megalite.objective.preference import DPO, REFERENCE, BradleyTerry
from megalite.schedule.ops import Op
from tests.parallel.test_meta_step import build
from tests.support.nccl import Hang, play
from tests.support.parity import Layout
from tests.support.recording import META, Recorder, Start, Wait, watching_the_host
from tests.support.virtual import World

STEPS = 2  # the second reduces gradients under backward, and waits for the first one's gathers

INTERLEAVED = {"schedule": "interleaved", "pipeline": 2}
LAYOUTS = {
    **{f"1f1b, zero {zero}": Layout(pipeline=2, data=2, zero=zero) for zero in (0, 1, 2, 3)},
    **{f"interleaved, zero {zero}": Layout(**INTERLEAVED, data=2, zero=zero) for zero in (1, 2, 3)},
    "1f1b, four ranks": Layout(pipeline=4, data=2),
    "zb_v": Layout(pipeline=2, schedule="zb_v", data=2, zero=1),
    "zb_h1, tensor": Layout(pipeline=2, schedule="zb_h1", tensor=2, sequence=True, data=2, zero=2),
    "tensor, zero 3": Layout(tensor=2, sequence=True, data=2, zero=3),
    "interleaved, tensor": Layout(**INTERLEAVED, tensor=2, sequence=True, data=2, zero=1),
    "context, gather": Layout(pipeline=2, context=2, data=2, zero=2),
    "context, ring": Layout(**INTERLEAVED, context=2, mode="ring", zero=1),
    "context, ulysses": Layout(context=2, mode="ulysses", tensor=2, sequence=True, data=2, zero=3),
}
EXPERTS = {
    "experts, 1f1b": Layout(pipeline=2, data=2, expert=2, zero=1),
    "experts, zero 2": Layout(data=4, expert=2, zero=2),
    "experts, tensor": Layout(tensor=2, sequence=True, data=2, expert=2, zero=1),
    "experts, interleaved, context": Layout(**INTERLEAVED, context=2, data=2, expert=2, zero=1),
}
OBJECTIVES = {"dpo": DPO, "reward": BradleyTerry}
TIED = {"model.tie_embeddings": True}
MOE = {
    "model.experts": 4,
    "model.experts_per_token": 2,
    "model.expert_ffn_hidden_size": 32,
    "model.shared_experts": 1,
    "train.precision": "fp32",
}


def batches(trainer, seed):
    """Four micro-batches of pairs, two documents of equal length in a row."""
    (rows, length), draw = trainer.shape, torch.Generator().manual_seed(seed)
    positions = torch.arange(length // 2).repeat(2).expand(rows, -1)
    documents = (torch.arange(length) >= length // 2).long().expand(rows, -1)

    def batch():
        tokens = torch.randint(trainer.config.model.vocab_size, (rows, length), generator=draw)
        columns = {
            "ends": (positions == length // 2 - 1).float(),
            REFERENCE: -torch.rand(rows, length, generator=draw),
        }
        return Batch(tokens, tokens.roll(-1, 1), positions, documents, columns).to(trainer.mesh.device)

    return [batch() for _ in range(4)]


def record(rank, layout, fields=None, objective=NEXT_TOKEN, make_group=None, change=lambda trainer: None):
    """(all that a rank starts and waits for, the last stage's number); alone on the meta device, or with values.

    `change` is made to the trainer before its first step.
    """
    recorder = Recorder(META if make_group is None else torch.device("cpu"), beneath=make_group)
    trainer, _ = build(layout, rank, {"data.document_mask": True} | (fields or {}), objective, recorder)
    change(trainer)
    if make_group is None:
        watch = watching_the_host(recorder)
    else:
        trainer.initialise()
        watch = contextlib.nullcontext()
    with watch:
        for number in range(STEPS):
            assert trainer.step(batches(trainer, number), 1e-3).accepted
    return recorder.events, trainer.stage_count - 1


def play_all(records):
    """By NCCL's rules, with communicators of pairs and without; what kinds of communication there were."""
    programs, (last, *_) = zip(*records)
    for one_communicator in (False, True):
        play(programs, last, one_communicator=one_communicator)
    return {event.name for event in programs[0] if isinstance(event, Start)}


def play_job(layout, fields=None, objective=NEXT_TOKEN):
    """The same of a job whose ranks train together, one after the other in this process."""
    world = World(layout.world)
    return play_all(world.run(lambda rank, make_group: record(rank, layout, fields, objective, make_group)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_step_hangs(name):
    layout = LAYOUTS[name]
    fields = TIED if name in ("1f1b, zero 1", "zb_v", "interleaved, tensor") else {}
    kinds = play_job(layout, fields)
    assert "all_reduce" in kinds and ("all_gather" in kinds) == (layout.zero > 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["1f1b, zero 1", "interleaved, zero 3", "interleaved, tensor", "context, gather"])
def test_no_step_of_pairs_hangs(name, objective):
    play_job(LAYOUTS[name], objective=OBJECTIVES[objective]())


@pytest.mark.parametrize("zero", [1, 3])
def test_no_step_of_whole_matrices_hangs(zero):
    layout = Layout(**INTERLEAVED, data=2, zero=zero)
    assert "all_to_all" in play_job(layout, {"optimizer.kind": "muon"})


@pytest.mark.parametrize("name", EXPERTS)
def test_no_step_with_experts_hangs(name):
    assert "all_to_all" in play_job(EXPERTS[name], MOE)


def exchanges_alone(layers, two):
    """How many times rows travel to experts or back while nothing of the other forward pass begins."""
    fields = MOE | {"model.layers": layers, "parallel.two_batch_overlap": two}

    def of_rank(rank, make_group):
        events, _ = record(rank, Layout(data=2, expert=2), fields, make_group=make_group)
        return [event for event in events if getattr(event, "during", None) == Op("F", 0, 0)]

    events = World(2).run(of_rank)[0]
    waits = {event.start: place for place, event in enumerate(events) if isinstance(event, Wait)}
    sent = [event for event in events if isinstance(event, Start) and event.name == "all_to_all"]
    rows = [event for event in sent if event.elements > 1000]
    others = [event for event in sent if event.elements <= MOE["model.experts"]]  # each pass counts rows first

    def begins(event):
        return events.index(event)

    alone = [not any(begins(row) < begins(other) < waits[row] for other in others + rows) for row in rows]
    return sum(alone), len(rows)


def test_rows_travel_under_the_other_pass():
    assert exchanges_alone(2, two=False) == (8, 8)  # two steps
    (few, rows), (more, further) = (exchanges_alone(layers, two=True) for layers in (2, 4))
    assert few == more and (rows, further) == (16, 32)  # alone are the last ones of a pass


@pytest.mark.parametrize("name", ["experts, zero 2", "experts, tensor"])
def test_no_step_of_two_passes_at_once_hangs(name):
    assert "all_to_all" in play_job(EXPERTS[name], MOE | {"parallel.two_batch_overlap": True})


def turn_gathers(trainer):
    order = trainer.buckets[0]._by_use
    order.insert(0, order.pop())


def turn_reductions(trainer):
    order = trainer.buckets[0]._in_order
    order.insert(0, order.pop())


@pytest.mark.fast
def test_another_order_on_one_rank_is_seen():
    """Ranks alone, on the meta device: with values, the ranks of a process would see it themselves."""
    layout, small = Layout(data=2), {"model.layers": 1}
    first, second = (record(rank, layout, small) for rank in range(2))
    play_all([first, second])
    for change in (turn_gathers, turn_reductions):
        with pytest.raises(Hang, match="meets"):
            play_all([first, record(1, layout, small, change=change)])


@pytest.mark.fast
def test_a_count_that_one_rank_asks_for_late_is_seen():
    """The first stage needs it only after its last backward, for which the last stage's first loss must be there."""
    (events, last), other = (record(rank, Layout(pipeline=2)) for rank in range(2))
    play_all([(events, last), other])
    count = next(event for event in events if isinstance(event, Start))
    assert (count.name, count.elements) == ("all_reduce", 1)
    late = [event for event in events if event is not count]
    late.insert(next(at for at, event in enumerate(late) if isinstance(event, Wait) and event.start is count), count)
    with pytest.raises(Hang, match=r"meets|deadlock"):
        play_all([(late, last), other])


@pytest.mark.fast
def test_rows_that_nobody_sent_are_seen():
    """An all-to-all that one rank expects more of than the other sends."""

    def program(rank, arriving):
        recorder = Recorder()
        group = Mesh(ep=2, rank=rank, device=META, make_group=recorder).group("ep")
        output, rows = torch.empty(sum(arriving), 4, device=META), torch.empty(3, 4, device=META)
        group.all_to_all(output, rows, arriving, (1, 2)).wait()
        return recorder.events, 0

    play_all([program(0, (1, 1)), program(1, (2, 2))])
    with pytest.raises(Hang, match="rows arrive"):
        play_all([program(0, (1, 1)), program(1, (3, 2))])
