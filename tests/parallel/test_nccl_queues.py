"""The pipeline engine under NCCL's rules: no order of its transfers can hang, and nothing is held longer than needed.

Each rank's engine runs alone against groups that write down what it starts and waits for; the stages are single linear
layers on the meta device.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megalite.mesh import Mesh
from megalite.parallel.collectives import TensorRegion
from megalite.parallel.engine import Activation, PipelineEngine
from megalite.parallel.fp8 import PLAIN
from megalite.parallel.linear import ColumnParallelLinear
from megalite.parallel.zero import StageBuckets
from megalite.placement import PlacedParameter, Placement, row_box
from megalite.schedule.lowering import lower
from megalite.schedule.ops import Op, counterpart, stage_owners
from megalite.schedule.schedules import SCHEDULES, build_schedule, forward_only, place_stages
from tests.support.nccl import Hang, play
from tests.support.recording import META, Recorder

WIDTH = 2
ACTIVATION = Activation((1, 1, WIDTH), torch.float32, META)


class Layer(nn.Module):
    """x W^T, and on both ends of a tied model a weight that two ranks share."""

    def __init__(self, mesh, stage, tied_ends):
        super().__init__()
        shape = (WIDTH, WIDTH)

        def weight(name, replicas):
            box = row_box(name, shape, 0, WIDTH, 0, replicas, partial=len(replicas) > 1)
            return PlacedParameter(torch.empty(shape, device=META), Placement((box,)))

        self.linear = ColumnParallelLinear(
            weight(f"w{stage}", (mesh.rank,)), None, TensorRegion(mesh.group("tp"), False), PLAIN
        )
        if len(tied_ends) == 2 and mesh.rank in tied_ends:
            self.shared = weight("tied", tied_ends)


class Rank:
    """One rank of a pipeline, alone."""

    def __init__(self, owners, rank, *, tied=False, dp=1):
        ranks = max(owners) + 1
        self.recorder = Recorder()
        self.owners, self.last = owners, len(owners) - 1
        self.mesh = Mesh(pp=ranks, dp=dp, rank=rank, device=META, make_group=self.recorder)
        stages = [stage for stage, owner in enumerate(owners) if owner == self.mesh.index("pp")]
        ends = tuple(sorted({self.mesh.rank_at(pp=owners[0]), self.mesh.rank_at(pp=owners[-1])})) if tied else ()
        self.layers = {stage: Layer(self.mesh, stage, ends if stage in (0, self.last) else ()) for stage in stages}
        self.buckets = {stage: StageBuckets(layer, self.mesh, zero=1) for stage, layer in self.layers.items()}

    def forward(self, stage, micro, hidden):
        hidden = torch.empty(ACTIVATION.shape, device=META) if hidden is None else hidden
        hidden = self.layers[stage].linear(hidden)
        return hidden.double().sum() if stage == self.last else hidden

    def run(self, ops, micros, *, train=True):
        """What this rank starts and waits for in a step."""
        self.recorder.events = []
        engine = PipelineEngine(ops, self.owners, self.mesh, ACTIVATION)
        if train:
            for buckets in self.buckets.values():
                buckets.begin(micros)
            engine.run(self.forward, self.buckets, self.recorder.observe)
        else:
            with torch.no_grad():
                engine.run(self.forward, observe=self.recorder.observe)
        assert not self.recorder.unwaited()
        return self.recorder.events


def kinds(most_ranks=8):
    """(schedule, ranks, chunks, numbers of micro-batches): short steps, full ones, and uneven ones."""
    for name, schedule in SCHEDULES.items():
        for ranks in range(2, most_ranks + 1):
            for chunks in (2, 3) if schedule.interleaves else (schedule.chunks,):
                micros = (ranks, 2 * ranks) if schedule.interleaves else (1, ranks, 2 * ranks + 1)
                yield name, ranks, chunks, micros


def check(lowered, ranks, micros, last, **options):
    programs = [rank.run(lowered[rank.mesh.index("pp")], micros, **options) for rank in ranks]
    for one_communicator in (False, True):
        play(programs, last, one_communicator=one_communicator)
    return programs


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_hangs_or_mixes_messages_up(name, tied):
    for _, ranks, chunks, all_micros in (kind for kind in kinds() if kind[0] == name):
        owners = place_stages(name, ranks, chunks)
        members = [Rank(owners, rank, tied=tied) for rank in range(ranks)]
        for micros in all_micros:
            plan = build_schedule(name, ranks, micros, chunks)
            check(lower(plan, tied=tied), members, micros, len(owners) - 1)
            if not tied:
                check(lower(forward_only(owners, micros)), members, micros, len(owners) - 1, train=False)


@pytest.mark.fast
@pytest.mark.parametrize("name", SCHEDULES)
def test_reductions_in_mid_schedule_do_not_hang(name):
    """Two data-parallel replicas, tied: transfers, the exchange and the reductions have queues of their own."""
    chunks = SCHEDULES[name].least_chunks
    owners = place_stages(name, 3, chunks)
    members = [Rank(owners, rank, tied=True, dp=2) for rank in range(6)]
    lowered = lower(build_schedule(name, 3, 6, chunks), tied=True)
    for _ in range(2):  # from the second step on, reductions start under backward
        programs = check(lowered, members, 6, len(owners) - 1)
    assert {event.name for event in programs[0] if hasattr(event, "name")} >= {"send", "receive", "reduce_scatter"}


def naive(plan):
    """Every receive right before its use and every send right after its operation, as one would write it at first."""
    owners, lowered = stage_owners(plan), []
    last = len(owners) - 1
    for rank, ops in enumerate(plan):
        mine = []
        for op in ops:
            before, after = {"F": ("RF", "SF"), "B": ("RB", "SB")}[op.kind]
            for kind, place in ((before, len(mine)), (after, None)):
                transfer = Op(kind, op.stage, op.micro)
                end = counterpart(transfer, last).stage
                if 0 <= end <= last and owners[end] != rank:
                    mine.insert(len(mine) if place is None else place, transfer)
                if place is not None:
                    mine.append(op)
        lowered.append(tuple(mine))
    return tuple(lowered)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "one_communicator"),
    [("1f1b", 2, 1, False), ("1f1b", 4, 1, True), ("interleaved", 2, 2, False), ("interleaved", 4, 2, True)],
)
def test_the_naive_order_hangs(name, ranks, chunks, one_communicator):
    owners = place_stages(name, ranks, chunks)
    plan = naive(build_schedule(name, ranks, 2 * ranks, chunks))
    programs = [Rank(owners, rank).run(plan[rank], 2 * ranks) for rank in range(ranks)]
    with pytest.raises(Hang):
        play(programs, len(owners) - 1, one_communicator=one_communicator)


@pytest.mark.fast
def test_two_ranks_that_both_receive_first_deadlock():
    def program(rank, order):
        recorder = Recorder()
        group = Mesh(pp=2, rank=rank, device=META, make_group=recorder).group("pp")
        for name in order:
            getattr(group, name)(torch.empty(1, device=META), 1 - rank).wait()
        return recorder.events

    for order in (("receive", "send"), ("send", "receive")):
        with pytest.raises(Hang):
            play([program(0, order), program(1, order)], 1, one_communicator=False)
    play([program(0, ("send", "receive")), program(1, ("receive", "send"))], 1, one_communicator=True)


class Held:
    """Which activations and gradients a rank holds, by what became of them; looked at after every operation."""

    def __init__(self, rank, train):
        self.rank, self.train = rank, train
        self.refs = defaultdict(list)
        self.most_sent = 0
        self.splits = False
        rank.recorder.sent, rank.recorder.after = self.sent, self.after

    def note(self, what, op, tensor):
        self.refs[what, op.stage, op.micro].append(StorageWeakRef(tensor.untyped_storage()))

    def alive(self, what, stage, micro):
        return any(not ref.expired() for ref in self.refs.get((what, stage, micro), ()))

    def sent(self, tensor, op):
        self.note("sent", op, tensor)

    def forward(self, stage, micro, hidden):
        op = Op("F", stage, micro)
        if hidden is not None:
            self.note("input", op, hidden)
            if self.train:
                hidden.register_hook(functools.partial(self.note, "input's gradient", op))
        output = Rank.forward(self.rank, stage, micro, hidden)
        self.note("output", op, output)
        if self.train:
            output.register_hook(functools.partial(self.note, "output's gradient", op))
        return output

    def after(self, op):
        kind, stage, micro = op
        self.splits |= kind == "I"
        sent = [key for key in self.refs if key[0] == "sent" and self.alive(*key)]
        self.most_sent = max(self.most_sent, len(sent))
        finished = kind in ("F" if not self.train else "BW")
        if finished:
            assert not self.alive("input", stage, micro), f"{op}: the input is still held"
        if kind in "BW":
            assert not self.alive("output's gradient", stage, micro), f"{op}: the incoming gradient is still held"


@pytest.mark.fast
@pytest.mark.parametrize("train", [True, False], ids=["training", "forward only"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_is_held_after_its_last_use(name, train):
    """At most two tensors are on their way to neighbours, however many micro-batches there are; a stage's input and
    the gradient that came to it are dropped with its last operation on the micro-batch."""
    chunks = SCHEDULES[name].least_chunks
    owners = place_stages(name, 4, chunks)
    plan = build_schedule(name, 4, 12, chunks) if train else forward_only(owners, 12)
    for number in range(4):
        rank = Rank(owners, number)
        held = Held(rank, train)
        rank.forward = held.forward
        rank.run(lower(plan)[number], 12, train=train)
        assert held.most_sent <= 2
        assert held.most_sent > 0 or (not train and number == owners[-1])
        assert not [key for key in held.refs if held.alive(*key) and key[0] != "output"]


@pytest.mark.fast
def test_a_postponed_product_is_dropped_as_soon_as_it_is_done():
    rank = Rank((0,), 0)
    buckets, weight = rank.buckets[0], rank.layers[0].linear.weight
    refs, seen = [], []
    with buckets.delaying(0):
        for _ in range(2):
            kept = torch.empty(1, device=META)
            refs.append(StorageWeakRef(kept.untyped_storage()))
            weight.delay(functools.partial(lambda kept: seen.append([ref.expired() for ref in refs]), kept))
            del kept
    buckets.run_delayed(0)
    assert seen == [[False, False], [True, False]]
