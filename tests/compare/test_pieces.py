"""Samples and hashes of tensors do not depend on how ranks cut them; a verdict sees few and many wrong elements."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megalite.compare.gather import by_name, gather
from megalite.compare.pieces import Piece, Port, Sampling, bits_of, read_pieces, write_pieces
from megalite.compare.verdict import compare

pytestmark = pytest.mark.fast

PORT = Port("model.layers.0.mlp", "activation", 1, "model.layers.0.mlp forward", (2.0, 0.0, 1.0))


def cut(whole, sampling, cuts, port=PORT):
    """The pieces of a tensor that is cut in each dimension, each on a rank of its own."""
    pieces = []
    bounds = [[0, *sorted(places), extent] for places, extent in zip(cuts, whole.shape)]
    for rank, where in enumerate(np.ndindex(*[len(each) - 1 for each in bounds])):
        offset = tuple(each[at] for each, at in zip(bounds, where))
        stop = tuple(each[at + 1] for each, at in zip(bounds, where))
        values = whole[tuple(map(slice, offset, stop))]
        kept, corner = sampling.take(port.name, whole.shape, offset, values)
        bits = bits_of(values, whole.shape, offset) if sampling.hashed else None
        pieces.append(Piece(port, rank, tuple(whole.shape), offset, tuple(values.shape), kept, corner, bits=bits))
    return pieces


@pytest.mark.parametrize("limit", [0, 1, 7, 60, 10**6])
def test_samples_and_hashes_do_not_depend_on_the_cut(tmp_path, limit):
    whole, sampling = torch.randn(7, 5, 11), Sampling(limit, hashed=True)
    alone = gather(cut(whole, sampling, [[], [], []]))
    write_pieces(tmp_path, cut(whole, sampling, [[2, 3], [1], [4, 9]]))
    several = gather(list(read_pieces(tmp_path)))
    assert alone.whole.size <= (limit or whole.numel()) and several.covered.all()
    assert np.array_equal(alone.whole, several.whole) and alone.bits == several.bits
    grid = np.ix_(*sampling.indices(PORT.name, whole.shape))
    assert np.array_equal(alone.whole, whole.numpy()[grid])
    other = whole.clone()
    other.view(torch.int32)[3, 2, 5] ^= 1
    swapped = whole.clone()
    swapped[0, 0, 0], swapped[6, 4, 10] = whole[6, 4, 10], whole[0, 0, 0]
    for changed in (other, swapped):
        assert gather(cut(changed, sampling, [[4], [], [3]])).bits != alone.bits


def test_terms_are_summed_and_of_replicas_each_counts():
    whole = torch.randn(4, 3, 6)
    parts = [torch.randn(4, 3, 6) for _ in range(2)]
    terms = [dataclasses.replace(cut(part, Sampling(), [[], [], []])[0], partial=True) for part in parts]
    assert np.allclose(gather(terms).whole, sum(parts))
    a = cut(whole, Sampling(), [[], [], []])
    noise = [cut(whole + 1e-7 * torch.randn(4, 3, 6), Sampling(), [[], [], []])]
    spoilt = whole.clone()
    spoilt[2] += 1e-3
    replicas = [
        *cut(whole, Sampling(), [[], [], []]),
        dataclasses.replace(cut(spoilt, Sampling(), [[], [], []])[0], rank=3),
    ]
    verdict = compare(a, replicas, noise, precision="fp32", same_precision=True)
    assert verdict.first is not None and verdict.first.rank == 3


@pytest.mark.parametrize("change", ["one token", "all elements", "not a number", "a part is missing"])
def test_what_differs_is_found_with_its_rank_and_box(change):
    whole = torch.randn(16, 4, 32)
    cuts = [[4, 8, 12], [], []]
    noise = [cut(whole + 1e-6 * torch.randn(whole.shape), Sampling(), cuts) for _ in range(2)]
    clean = whole + 1e-6 * torch.randn(whole.shape)
    a, b = cut(whole, Sampling(), cuts), cut(clean, Sampling(), [[8], [], []])
    assert compare(a, b, noise, precision="fp32", same_precision=True).first is None
    if change == "one token":
        clean[9, 2] += 1e-4
    elif change == "all elements":
        clean += 4e-5 * torch.sign(torch.randn(whole.shape))
    elif change == "not a number":
        clean[15, 0, 0] = float("nan")
    b = cut(clean, Sampling(), [[8], [], []])
    b = b[:1] if change == "a part is missing" else b
    first = compare(a, b, noise, precision="fp32", same_precision=True).first
    assert first is not None and first.port == PORT
    if change in ("one token", "not a number"):
        assert (first.rank, first.offset, first.size) == (1, (8, 0, 0), (8, 4, 32))


def test_a_weight_that_one_side_lacks_is_a_difference():
    port = dataclasses.replace(PORT, kind="weight")
    a = cut(torch.randn(3, 4, 5), Sampling(), [[], [], []], port)
    options = {"precision": "fp32", "same_precision": True}
    assert compare(a, [], [], **options).first.remark == "b lacks it"
    assert compare(a, [], [], **options, same_names=False).first is None
    other = cut(torch.randn(3, 4, 6), Sampling(), [[], [], []], port)
    assert "shape" in compare(a, other, [], **options).first.remark


def test_the_first_in_the_order_of_execution_is_named():
    ports = [dataclasses.replace(PORT, name=f"model.layers.{n}.mlp", turn=(2.0, 0.0, float(n))) for n in range(4)]
    tensors = [torch.randn(3, 2, 40) for _ in ports]
    noise = [[cut(t + 1e-7 * torch.randn(t.shape), Sampling(), [[], [], []], p)[0] for t, p in zip(tensors, ports)]]
    a = [cut(t, Sampling(), [[], [], []], p)[0] for t, p in zip(tensors, ports)]
    b = [cut(t * (1.01 if n >= 2 else 1), Sampling(), [[1], [], []], p) for n, (t, p) in enumerate(zip(tensors, ports))]
    shuffled = [piece for pieces in b[::-1] for piece in pieces]
    verdict = compare(a, shuffled, noise, precision="fp32", same_precision=True)
    assert verdict.first is not None and verdict.first.port.name == "model.layers.2.mlp"
    assert verdict.summary()["same_bits"] == 2 and len(by_name(shuffled)) == 4
