"""Coordinates and groups, up to a mesh of 16,384 ranks on one core, and the groups' communications."""

import itertools
import random
import time
import tracemalloc

import pytest
import torch
import torch.distributed as dist

from megalite.mesh import AXES, Group, Mesh, create_group
from megalite.schedule.lowering import lower
from megalite.schedule.schedules import build_schedule
from megalite.schedule.simulate import check_deadlock
from tests.support.chaos import ChaosGroups

pytestmark = pytest.mark.fast


def test_coordinates_count_tp_fastest_and_pp_slowest():
    shape = {"pp": 2, "dp": 3, "ep": 1, "cp": 1, "tp": 4}
    for rank, indices in enumerate(itertools.product(*(range(shape[axis]) for axis in AXES))):
        mesh = Mesh(**shape, rank=rank)
        assert tuple(mesh.coordinate[axis] for axis in AXES) == indices
        assert mesh.rank_at() == rank
        assert mesh.rank_at(pp=1 - mesh.index("pp")) == (rank + 12) % 24


def test_ranks_along_axes_partition_the_world():
    shape = {"pp": 2, "dp": 3, "ep": 1, "cp": 2, "tp": 2}
    meshes = [Mesh(**shape, rank=rank) for rank in range(24)]
    for axes in itertools.chain.from_iterable(itertools.combinations(AXES, n) for n in range(5)):
        lines = {mesh.ranks_along(*axes) for mesh in meshes}
        assert sorted(itertools.chain(*lines)) == list(range(24))
        for mesh in meshes:
            line = mesh.ranks_along(*axes)
            fixed = [axis for axis in AXES if axis not in axes]
            assert line == tuple(m.rank for m in meshes if all(m.index(axis) == mesh.index(axis) for axis in fixed))


def test_rank_outside_the_mesh_is_refused():
    with pytest.raises(ValueError, match="rank 4 is outside a mesh of 4 ranks"):
        Mesh(tp=4, rank=4)


@pytest.fixture
def fake_world():
    """A process group that believes in any number of ranks and sends nothing."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def start(rank, size):
        dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def groups_of(mesh):
    return {axes: mesh.group(*axes).ranks for axes in (("tp",), ("pp",), ("dp", "cp"), AXES)}


@pytest.mark.parametrize("rank", [0, 1, 7, 8, 1023, 1024, 9001, 16383])
def test_a_mesh_of_16384_ranks(fake_world, rank):
    """TP 8 x PP 16 x DP 128: this rank's groups, from arithmetic written differently here."""
    started = time.process_time()
    fake_world(rank, 16384)
    groups = groups_of(Mesh(pp=16, dp=128, tp=8, rank=rank))
    tp, dp, pp = rank % 8, rank // 8 % 128, rank // 1024
    assert groups[("tp",)] == tuple(1024 * pp + 8 * dp + i for i in range(8))
    assert groups["dp", "cp"] == tuple(1024 * pp + 8 * i + tp for i in range(128))
    assert groups[("pp",)] == tuple(1024 * i + 8 * dp + tp for i in range(16))
    assert groups[AXES] == tuple(range(16384))
    assert time.process_time() - started < 10


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_the_schedules_of_16384_ranks(name, chunks):
    """16 stages, 64 micro-batches, tied embeddings: lowered and free of deadlock, within seconds."""
    started = time.process_time()
    plan = lower(build_schedule(name, 16, 64, chunks), tied=True)
    check_deadlock(plan)
    assert len(plan) == 16
    assert time.process_time() - started < 15


def test_memory_does_not_grow_with_the_world(fake_world):
    """A rank of 16,384 keeps the numbers of its peers and little more: under a megabyte above a rank of 128."""

    def kept(pp, dp):
        if dist.is_initialized():
            dist.destroy_process_group()
        fake_world(5, pp * dp * 8)
        tracemalloc.start()
        mesh = Mesh(pp=pp, dp=dp, tp=8, rank=5)
        groups_of(mesh)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size

    kept(4, 4)  # what torch makes on first use
    small, large = kept(4, 4), kept(16, 128)
    assert large - small < 1 << 20, (small, large)


def communicate(rank, chaos):
    """Every operation of Group on a part of the world and on the whole of it."""
    chaotic = ChaosGroups(seed=rank)
    options = {"make_group": chaotic} if chaos else {}
    mesh = Mesh(dp=2, tp=2, rank=rank, **options)
    for axes in (("tp",), ("dp",)):
        group = mesh.group(*axes)
        mine = torch.arange(6.0).view(3, 2) + 10 * rank
        others = [torch.arange(6.0).view(3, 2) + 10 * peer for peer in group.ranks]
        total, most = mine.clone(), mine.clone()
        group.all_reduce(total).wait()
        group.all_reduce(most, "max").wait()
        assert torch.equal(total, sum(others)) and torch.equal(most, others[-1])
        whole = torch.empty(6, 2)
        group.all_gather(whole, mine).wait()
        assert torch.equal(whole, torch.cat(others))
        part = torch.empty(3, 2)
        group.reduce_scatter(part, torch.cat([mine, mine + 100])).wait()
        assert torch.equal(part, sum(other + 100 * group.index for other in others))
        copy = mine.clone()
        group.broadcast(copy, 1).wait()
        assert torch.equal(copy, others[1])
        other = 1 - group.index
        arriving = torch.empty(3, 2)
        sent, received = group.send(mine, other), group.receive(arriving, other)
        received.wait()
        sent.wait()
        assert torch.equal(arriving, others[other])
    if chaos:
        chaotic.verify()


@pytest.mark.parametrize("chaos", [False, True], ids=["calm", "chaos"])
def test_communications(pool, chaos):
    pool.run(communicate, 4, chaos)


def many_at_once(rank, ranks):
    """Gathers and reductions of several sizes under way together, and a transfer between, waited for in any order."""
    draw = random.Random(rank)
    group = Mesh(dp=ranks, rank=rank).group("dp")
    sizes = [3, 1 << 14, (1 << 14) + 5, 1 << 16]  # of fp32: from 64 KiB on as transfers, where the ranks are few
    data = [[torch.arange(ranks * size).float().add(1000 * peer) for size in sizes] for peer in range(ranks)]
    time.sleep(0.02 * draw.random())
    works, checks = [], []
    for number, size in enumerate(sizes):
        mine, whole, part = data[rank][number], torch.full((ranks * size,), torch.nan), torch.full((size,), torch.nan)
        works += [group.all_gather(whole, mine[:size]), group.reduce_scatter(part, mine)]
        checks.append((whole, torch.cat([data[peer][number][:size] for peer in range(ranks)])))
        checks.append((part, sum(data[peer][number] for peer in range(ranks)).view(ranks, size)[rank]))
        if rank < 2:
            arriving = group.exchange(mine, 1 - rank)
            checks.append((arriving, data[1 - rank][number]))
    draw.shuffle(works)
    for work in works:
        work.wait()
    for got, expected in checks:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_many_communications_at_once(pool, ranks):
    pool.run(many_at_once, ranks, ranks)


def sum_some(rank, members, values):
    chaotic = ChaosGroups(seed=rank)
    group = Mesh(tp=4, rank=rank, make_group=chaotic).group("tp")
    mine = values[rank].clone()
    if rank in members:
        group.sum_over_members(mine, members)
    chaotic.verify()
    return mine


@pytest.mark.parametrize("members", [(0, 1, 2, 3), (1, 2), (0, 2, 3), (0, 3)])
def test_sum_among_some_ranks_of_a_group(pool, members):
    """All members get the same bits; the others keep theirs and need not know."""
    values = torch.randn(4, 5, 3)
    results = pool.run(sum_some, 4, members, values)
    for rank, result in enumerate(results):
        if rank not in members:
            assert torch.equal(result, values[rank])
            continue
        assert torch.equal(result, results[members[0]])
        torch.testing.assert_close(result, values[list(members)].sum(0))


def test_a_group_of_one_needs_no_backend():
    group = Group((3,), 3, None)
    x = torch.randn(4)
    out = torch.empty(4)
    group.all_gather(out, x).wait()
    assert torch.equal(out, x)
    out = torch.empty(4)
    group.reduce_scatter(out, x).wait()
    assert torch.equal(out, x)
    kept = x.clone()
    group.all_reduce(kept).wait()
    group.broadcast(kept, 0).wait()
    group.sum_over_members(kept, (0,))
    assert torch.equal(kept, x)


class Recording(Group):
    """A group that writes down who meets whom, and still communicates."""

    def __init__(self, ranks, rank, log):
        super().__init__(ranks, rank, create_group(ranks, rank).handle)
        self.log = log

    def all_reduce(self, tensor, op="sum"):
        self.log.append(("all", self.ranks))
        return super().all_reduce(tensor, op)

    def send(self, tensor, to):
        self.log.append((self.ranks[self.index], self.ranks[to]))
        return super().send(tensor, to)

    def receive(self, tensor, source):
        self.log.append((self.ranks[source], self.ranks[self.index]))
        return super().receive(tensor, source)


def warm(rank, pp, tp):
    log = []
    mesh = Mesh(pp=pp, tp=tp, rank=rank, make_group=lambda ranks, rank: Recording(ranks, rank, log))
    for axes in (("tp",), ("pp",), AXES):
        mesh.group(*axes)
    mesh.warm_up()
    return log


@pytest.mark.parametrize(("pp", "tp"), [(2, 2), (4, 1), (3, 1), (1, 2)])
def test_every_connection_is_used_once_in_one_order(pool, pp, tp):
    logs = pool.run(warm, pp * tp, pp, tp)
    for one, other in itertools.combinations(logs, 2):
        assert [event for event in one if event in other] == [event for event in other if event in one]
    if pp > 2:  # the group of a whole pipeline has no communicator of its own; here it is the world's
        assert all(log.count(("all", tuple(range(pp * tp)))) == 1 for log in logs)
    pairs = {event for log in logs for event in log if event[0] != "all"}
    neighbours = {(rank, (rank + tp) % (pp * tp)) for rank in range(pp * tp)} if pp > 1 else set()
    assert pairs == neighbours | {(high, low) for low, high in neighbours}
