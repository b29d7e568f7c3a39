"""The doctor's look at collectives: groups of any size pass, and one that gives something wrong is told by its name."""

import pytest
import torch

from megalite.doctor.network import _check
from megalite.mesh import AXES, Group, Mesh, create_group


class Spoilt(Group):
    """A group that loses the last number of what a rank receives in an all-to-all."""

    def all_to_all(self, output, tensor, arriving, leaving):
        work = super().all_to_all(output, tensor, arriving, leaving)
        work.wait()
        output[-1] = 0
        return work


def spoilt(ranks, rank):
    whole = create_group(ranks, rank)
    return Spoilt(whole.ranks, rank, whole.handle)


def look(rank, sizes, make_group):
    mesh = Mesh(**sizes, rank=rank, make_group=make_group)
    for axis in AXES:
        group = mesh.group(axis)
        if group.size > 1:
            try:
                _check(group, torch.device("cpu"))
            except AssertionError as error:
                return str(error)
    return None


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 3}, {"dp": 2, "ep": 2}, {"ep": 4}, {"pp": 2, "cp": 2}])
def test_groups_of_any_size_are_well(pool, sizes):
    world = torch.tensor(list(sizes.values())).prod().item()
    assert pool.run(look, world, sizes, create_group) == [None] * world


def test_a_wrong_exchange_is_told(pool):
    for said in pool.run(look, 2, {"ep": 2}, spoilt):
        assert said.startswith("all-to-all gives ") and said.endswith(" is right")
