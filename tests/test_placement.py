"""Placements: boxes, their flat ranges, and initial weights that are the same in every layout."""

import hashlib
import itertools
import random

import pytest
import torch

from megalite.config import ModelConfig
from megalite.kernels import select_kernels
from megalite.mesh import Group, Mesh
from megalite.model.decoder import Stage
from megalite.model.init import initial_values, initialise
from megalite.model.partition import layers_of_stage
from megalite.parallel.heads import split_heads
from megalite.placement import (
    Box,
    Placement,
    flat_ranges,
    placed_parameters,
    range_boxes,
    row_box,
    split_evenly,
)

pytestmark = pytest.mark.fast

MODEL = ModelConfig(
    layers=5,
    hidden_size=20,
    ffn_hidden_size=36,
    heads=12,
    kv_heads=3,
    head_dim=4,
    vocab_size=37,
    max_positions=16,
    qk_norm=True,
    attention_bias=True,
)


def silent_group(ranks, rank):
    """For layouts that are built and never run."""
    return Group(ranks, rank, None)


def stages_of(pp, tp, model=MODEL):
    for rank in range(pp * tp):
        mesh = Mesh(pp=pp, tp=tp, rank=rank, make_group=silent_group)
        stage = Stage(
            model, mesh, select_kernels({}, mesh.device), stage=mesh.index("pp"), owners=range(pp), sequence=tp > 1
        )
        initialise(stage, 7)
        yield rank, stage


def global_tensors(pp, tp, model=MODEL):
    """Whole initial tensors; every element must be held by exactly the replicas that its box names."""
    whole, holders = {}, {}
    for rank, stage in stages_of(pp, tp, model):
        for parameter in placed_parameters(stage):
            for box in parameter.placement.boxes:
                assert rank in box.replicas and tuple(sorted(set(box.replicas))) == box.replicas
                full = whole.setdefault(box.name, torch.full(box.shape, float("nan")))
                held = holders.setdefault(box.name, [[] for _ in range(full.numel())])
                known = box.of(full)
                assert (known.isnan() | (known == box.view(parameter))).all()
                known.copy_(box.view(parameter.detach()))
                numbers = box.of(torch.arange(full.numel()).view(box.shape)).flatten().tolist()
                for number in numbers if parameter.tied_to is None else ():
                    held[number].append((rank, box.replicas))
    for name, full in whole.items():
        assert not full.isnan().any(), name
        for entries in holders[name]:
            assert {replicas for _, replicas in entries} == {tuple(rank for rank, _ in entries)}, name
    return whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pp", "tp"), [(1, 2), (1, 3), (1, 4), (2, 1), (5, 1), (2, 2), (3, 4)])
def test_initial_weights_are_the_same_in_every_layout(pp, tp, tied):
    model = ModelConfig(**{**vars(MODEL), "tie_embeddings": tied})
    alone, ours = global_tensors(1, 1, model), global_tensors(pp, tp, model)
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(ours[name], value), name


def test_initial_weights_stay_what_they_are():
    """The hash of one model's weights: a checkpointless run must be repeatable with the next version, too."""
    digest = hashlib.sha256()
    for name, value in sorted(global_tensors(1, 1).items()):
        digest.update(name.encode())
        digest.update(value.numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == "a4dc8910eebb270906b2344d0f399acc11e947870ccfcfa1d8e597dfa09ef7a0"


def test_initial_weights_have_their_distribution():
    box = row_box("w", (400, 50), 0, 400, 0, (0,))
    values = initial_values(box, Placement((box,), std=0.02), 3)
    assert abs(values.mean()) < 5e-4 and abs(values.std() - 0.02) < 5e-4
    ones = initial_values(box, Placement((box,), init="ones"), 3)
    assert torch.equal(ones, torch.ones(400, 50))
    assert not initial_values(box, Placement((box,), init="zeros"), 3).any()


def test_a_row_depends_on_seed_name_and_number_alone():
    def rows(name="w", first=0, count=6, total=6, seed=1):
        box = row_box(name, (total, 8), first, count, 0, (0,))
        return initial_values(box, Placement((box,)), seed)

    base = rows()
    assert torch.equal(rows(first=2, count=3), base[2:5])
    assert torch.equal(rows(total=600), base)  # a longer vocabulary keeps the rows that it had
    assert not (rows(name="v") == base).any()
    assert not (rows(seed=2) == base).any()
    assert len({tuple(row.tolist()) for row in base}) == 6
    columns = Box("w", (6, 8), (1, 3), (4, 2), (0, 0), (0,))
    assert torch.equal(initial_values(columns, Placement((columns,)), 1), base[1:5, 3:5])


def random_box(shape, rng):
    size = tuple(rng.randint(1, extent) for extent in shape)
    local_offset = tuple(rng.randint(0, extent - length) for extent, length in zip(shape, size))
    offset = tuple(rng.randint(0, 5) for _ in shape)
    full = tuple(start + length + rng.randint(0, 3) for start, length in zip(offset, size))
    return Box("w", full, offset, size, local_offset, (0,))


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 4), (1, 6), (6, 1), (3, 4, 5)])
def test_flat_ranges_cover_a_box_and_nothing_else(shape):
    rng = random.Random()
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for _ in range(30):
        box = random_box(shape, rng)
        ranges = list(flat_ranges(box, shape))
        assert list(itertools.chain(*(range(*pair) for pair in ranges))) == box.view(numbers).flatten().tolist()
        assert all(one[1] < other[0] or box.size != shape for one, other in itertools.pairwise(ranges))


@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 6), (6, 1), (3, 4, 5)])
def test_range_boxes_are_the_part_of_a_box_inside_a_range(shape):
    rng = random.Random()
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for _ in range(50):
        box = random_box(shape, rng)
        start, stop = sorted(rng.choices(range(numbers.numel() + 1), k=2))
        full = torch.full(box.shape, -1)
        box.of(full).copy_(box.view(numbers))
        seen = []
        for part, first in range_boxes(box, shape, start, stop):
            local = part.view(numbers).flatten().tolist()
            assert local == list(range(first, first + len(local)))  # contiguous
            assert torch.equal(part.of(full), part.view(numbers))  # the same place in the global tensor
            seen += local
        assert seen == [number for number in box.view(numbers).flatten().tolist() if start <= number < stop]


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (3, 4), (8, 4), (1, 1), (0, 2)])
def test_split_evenly(total, parts):
    pieces = [split_evenly(total, parts, index) for index in range(parts)]
    assert list(itertools.chain(*(range(start, start + length) for start, length in pieces))) == list(range(total))
    lengths = [length for _, length in pieces]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("layers", "vocabulary", "lengths"),
    [
        (5, 100, [2, 2, 1]),
        (6, 100, [2, 2, 2]),
        (32, 128256, [9, 9, 8, 6]),  # Llama 3 8B: the output layer costs as much as 2.4 layers
        (32, 32000, [8, 8, 8, 8]),
        (4, 10**7, [1, 1, 1, 1]),
        (6, 10**7, [2, 2, 1, 1]),
    ],
)
def test_the_slowest_stage_is_as_fast_as_it_can_be(layers, vocabulary, lengths):
    model = ModelConfig(
        layers=layers, vocab_size=vocabulary, hidden_size=4096, ffn_hidden_size=14336, heads=32, kv_heads=8
    )
    stages = [layers_of_stage(model, len(lengths), stage) for stage in range(len(lengths))]
    assert [len(stage) for stage in stages] == lengths
    assert [layer for stage in stages for layer in stage] == list(range(layers))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "parts"), [(6, 3, 2), (12, 3, 4), (8, 1, 8), (8, 8, 4), (12, 2, 3), (32, 8, 16)]
)
def test_a_rank_holds_the_kv_heads_that_its_query_heads_read(heads, kv_heads, parts):
    group = heads // kv_heads
    for index in range(parts):
        split = split_heads(heads, kv_heads, parts, index)
        queries = range(split.first_query, split.first_query + split.queries)
        assert list(queries) == list(range(index * heads // parts, (index + 1) * heads // parts))
        needed = sorted({query // group for query in queries})
        assert list(range(split.first_kv, split.first_kv + split.kvs)) == needed
        assert [split.first_kv + kv for kv in split.kv_of_query] == [query // group for query in queries]
        local = torch.arange(split.kvs).repeat_interleave(max(1, split.queries // split.kvs)).tolist()
        assert split.grouped == (local == list(split.kv_of_query))
