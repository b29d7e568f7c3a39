"""The cache gives back what it was given, row by row, whichever rows have been dropped in between."""

from __future__ import annotations

import pytest
import torch

from megalite.generation.cache import DecoderCache
from megalite.generation.row_group import RowGroup
from megalite.mesh import Mesh
from megalite.parallel.context import ContextRegion

pytestmark = pytest.mark.fast

CAPACITY = 23


def _new(length: int, rows: int) -> list[torch.Tensor]:
    """What different kinds of attention keep of a token."""
    return [torch.randn(length, rows, *shape) for shape in ((3, 4), (5,), ())]


def test_rows_keep_their_positions() -> None:
    """Rows are dropped at random; what is left is equal to the same rows of a plain list."""
    for _ in range(20):
        prompts = {row: [1] * int(torch.randint(1, 6, ())) for row in range(7)}
        group = RowGroup(prompts, range(100, 107), 200, ContextRegion.alone(Mesh()))
        longest = max(map(len, prompts.values()))
        expected = {layer: _new(longest, 7) for layer in (2, 5)}
        for layer, new in expected.items():
            group.cache.extend(layer, *new)
        while group.size:
            gone = {member for member in group.members if torch.rand(()) < 0.3}
            kept = [slot for slot, member in enumerate(group.members) if member not in gone]
            of_member = {group.members[slot]: slot for slot in kept}
            before = group.uniforms(3)
            group.drop(gone)
            if not group.size:
                break
            order = [of_member[member] for member in group.members]
            assert torch.equal(group.uniforms(3), before[order])
            group.append(torch.arange(group.size))
            for layer, tensors in expected.items():
                new = _new(1, group.size)
                expected[layer] = [torch.cat((old[:, order], add)) for old, add in zip(tensors, new)]
                for mine, whole in zip(group.cache.extend(layer, *new), expected[layer], strict=True):
                    assert torch.equal(mine, whole)


def test_memory_is_that_of_the_documented_formula() -> None:
    """And rows that are dropped cost none."""
    cache, places = DecoderCache(CAPACITY), {}
    for layer in range(3):
        views = cache.extend(layer, torch.randn(5, 4, 2, 8), torch.randn(5, 4, 2, 8))
        places[layer] = [view.untyped_storage().data_ptr() for view in views]
        assert {view.untyped_storage().nbytes() for view in views} == {CAPACITY * 4 * 2 * 8 * 4}
    cache.keep(2, {0: 3})
    for layer, before in places.items():
        views = cache.extend(layer, torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8))
        assert [view.untyped_storage().data_ptr() for view in views] == before
    with pytest.raises(IndexError, match="24 positions in a cache of 23"):
        cache.extend(0, torch.randn(18, 2, 2, 8), torch.randn(18, 2, 2, 8))
