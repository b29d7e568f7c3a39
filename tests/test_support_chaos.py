"""The chaos groups: right programs run on them as on plain ones, and each kind of race is caught."""

import random

import pytest
import torch

from megalite.mesh import Mesh
from tests.support.chaos import ChaosGroups, RaceError
from tests.support.pool import WorkerError
from tests.support.virtual import World

pytestmark = pytest.mark.fast


@pytest.fixture(params=["processes", "one process"])
def run(request, pool):
    """`run(program, size, *args)`: on gloo's groups, and on those of ranks that are threads."""

    def run_virtually(program, size, *args):
        world = World(size, random.Random(5))
        return world.run(lambda rank, make: program(rank, *args, make=make, pause=world.pause))

    return pool.run if request.param == "processes" else run_virtually


def chaotic_world(rank, size=2, **options):
    groups = ChaosGroups(seed=rank, **options)
    return groups, Mesh(tp=size, rank=rank, make_group=groups).world


def careful_program(rank, dtype, seed, **options):
    groups, world = chaotic_world(rank, 3, **options)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(-50, 50, (3, 6, 5), generator=generator).to(dtype)  # [rank, ...]: small integers sum exactly
    mine = data[rank].clone()
    reduced, gathered, scattered = mine.clone(), torch.empty(18, 5, dtype=dtype), torch.empty(2, 5, dtype=dtype)
    sent, copied = torch.empty(6, 5, dtype=dtype), mine.clone()
    works = [
        world.all_reduce(reduced),
        world.all_gather(gathered, mine),
        world.reduce_scatter(scattered, mine),
        world.broadcast(copied, 1),
        world.send(mine, (rank + 1) % 3),
        world.receive(sent, (rank - 1) % 3),
    ]
    poisoned = torch.isnan(reduced.view(-1)[::2]).all() if dtype.is_floating_point else (reduced < -100).all()
    for work in reversed(works):
        work.wait()
    groups.verify()
    assert poisoned
    torch.testing.assert_close(reduced, data.sum(0).to(dtype), rtol=0, atol=0)
    assert torch.equal(gathered, data.flatten(0, 1))
    torch.testing.assert_close(scattered, data.sum(0)[2 * rank : 2 * rank + 2].to(dtype), rtol=0, atol=0)
    assert torch.equal(copied, data[1]) and torch.equal(sent, data[(rank - 1) % 3])
    return float(reduced.double().sum())


def reads_early(rank, **options):
    _, world = chaotic_world(rank, **options)
    tensor = torch.ones(4)
    work = world.all_reduce(tensor)
    early = tensor.sum().item()
    work.wait()
    return early, tensor.sum().item()


def writes_while_sending(rank, **options):
    _, world = chaotic_world(rank, **options)
    tensor = torch.ones(4)
    work = world.send(tensor, 1) if rank == 0 else world.receive(torch.empty(4), 0)
    tensor[2] = 5.0
    work.wait()


def writes_into_a_result(rank, **options):
    _, world = chaotic_world(rank, **options)
    tensor = torch.ones(4)
    work = world.all_reduce(tensor)
    tensor[1] = 0.0
    work.wait()


def adds_to_a_result(rank, **options):
    """Poison that swallows what is added to it would hide this."""
    _, world = chaotic_world(rank, **options)
    tensor = torch.ones(4)
    work = world.all_reduce(tensor)
    tensor.add_(torch.full((4,), 0.25))
    work.wait()


def forgets_to_wait(rank, **options):
    groups, world = chaotic_world(rank, **options)
    tensor = torch.ones(4)
    world.broadcast(tensor, 0)
    groups.verify()


def sends_columns(rank, **options):
    _, world = chaotic_world(rank, **options)
    world.all_reduce(torch.ones(4, 3).t()).wait()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_careful_program_gets_the_right_results(run, dtype):
    sums = run(careful_program, 3, dtype, torch.seed() % 2**31)
    assert len(set(sums)) == 1


def test_an_early_reader_reads_poison(run):
    for early, late in run(reads_early, 2):
        assert early != early and late == 8.0


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (writes_while_sending, "the input of send .* was written before wait"),
        (writes_into_a_result, "the output of all_reduce .* was written before wait"),
        (adds_to_a_result, "the output of all_reduce .* was written before wait"),
        (forgets_to_wait, "never waited for:\nbroadcast among ranks .*test_support_chaos.py"),
        (sends_columns, ".*not contiguous"),
    ],
)
def test_races_are_caught(run, pool, program, complaint):
    kind, told = (WorkerError, f"{RaceError.__name__}: ") if run == pool.run else (RaceError, "^")
    with pytest.raises(kind, match=f"(?s){told}{complaint}"):
        run(program, 2)
