"""Attention of a split sequence against that of one rank: output and dQ, dK, dV, for every way of seeing the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.kernels import select_kernels
from megalite.kernels.attention import Documents, attention_reference
from megalite.mesh import CPU, Group, Mesh
from megalite.parallel.context import PADDING, ContextRegion
from megalite.parallel.context_attention import ContextAttention
from tests.support.chaos import ChaosGroups
from tests.support.pool import Pool

MODES = ["gather", "ring", "ulysses"]
BATCH = 2


def tensors_of(length: int, heads: tuple[int, int], width: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient, each [S, B, heads, D]; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    queries, kvs = ((length, BATCH, count, width) for count in heads)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in (queries, kvs, kvs, queries)]


def documents_of(length: int, seed: int) -> Tensor:
    """Documents of any length [S, B]: a long one across all cuts, and single tokens; other cuts in every sample."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(length, BATCH, generator=generator) < 0.2).cumsum(0)
    numbers[:, 1] = (torch.arange(length) > length - 3) + (torch.arange(length) == length - 1)
    return numbers


def attend(rank: int, case: dict[str, Any]) -> list[Tensor]:
    """This rank's rows of the output and of the gradients."""
    mode, length, ranks, seed = case["mode"], case["length"], case["ranks"], case["seed"]
    groups = ChaosGroups(seed=rank)
    region = ContextRegion.of(Mesh(cp=ranks, rank=rank, make_group=groups), mode, 1)
    attention = ContextAttention(region, select_kernels(case.get("kernels", {}), CPU))
    rows = region.rows(length)
    rows = rows[rows < length]
    padded = region.padded(length) - length

    def own(x: Tensor) -> Tensor:
        whole = torch.cat((x, torch.full((padded, *x.shape[1:]), 5.0, dtype=x.dtype)))
        return whole[region.rows(length)].clone()

    q, k, v, grad = map(own, tensors_of(length, case["heads"], case["width"], seed, case["dtype"]))
    grad[len(rows) :] = 0  # no loss is made of padding
    leaves = [x.requires_grad_() for x in (q, k, v)]
    documents = None
    if case["packed"]:
        documents = Documents(region.pad(documents_of(length, seed).t(), PADDING).t())
    out = attention(*leaves, window=case["window"], documents=documents)
    grads = torch.autograd.grad(out, leaves, grad)
    groups.verify()
    return [x.detach()[: len(rows)] for x in (out, *grads)]


def alone(case: dict[str, Any]) -> list[Tensor]:
    tensors = tensors_of(case["length"], case["heads"], case["width"], case["seed"], case["dtype"])
    q, k, v, grad = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    documents = documents_of(case["length"], case["seed"]) if case["packed"] else None
    out = attention_reference(*leaves, window=case["window"], documents=documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(pool: Pool, **options: Any) -> None:
    """`length`, `ranks`, `mode`; `packed` in documents, `window`, `heads` = (query, key/value), `dtype`, `limit`."""
    given = {"packed": False, "window": None, "heads": (6, 2), "width": 8, "dtype": torch.float32, "limit": 2e-6}
    case = {**given, **options, "seed": int(torch.randint(10**6, ()))}
    ranks = case["ranks"]
    results = pool.run(attend, ranks, case)
    regions = [ContextRegion(Group(tuple(range(ranks)), rank, None)) for rank in range(ranks)]
    for index, expected in enumerate(alone(case)):
        whole = torch.full(expected.shape, torch.nan, dtype=torch.float64)
        for region, result in zip(regions, results):
            rows = region.rows(case["length"])
            whole[rows[rows < case["length"]]] = result[index].double()
        error = (whole - expected).norm() / expected.norm()
        assert error < case["limit"], (("out", "dq", "dk", "dv")[index], error, case)


@pytest.mark.fast
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_with_documents_and_a_window(pool: Pool, mode: str) -> None:
    check(pool, mode=mode, ranks=2, length=24, packed=True, window=7)


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"window": 5}, {"packed": True, "window": 11}], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [3, 4])
def test_any_number_of_ranks(pool: Pool, ranks: int, mode: str, options: dict[str, Any]) -> None:
    """12 query heads: with 3 key/value heads, the ranks of ulysses share some of them, unevenly on four."""
    check(pool, mode=mode, ranks=ranks, length=48, heads=(12, 3), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [9, 13, 23, 31])
def test_odd_lengths_are_padded_and_not_cut(pool: Pool, mode: str, length: int) -> None:
    """A packed length rounded down loses the last tokens' attention without a word."""
    check(pool, mode=mode, ranks=4, length=length, heads=(4, 1), packed=True)


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (4, 4), (8, 2)])
def test_key_value_heads_fewer_than_ranks(pool: Pool, heads: tuple[int, int]) -> None:
    """Ulysses sends a head to all ranks whose queries read it, and adds up the gradients that come back."""
    check(pool, mode="ulysses", ranks=4, length=16, heads=heads)


@pytest.mark.parametrize("mode", MODES)
def test_bf16(pool: Pool, mode: str) -> None:
    check(pool, mode=mode, ranks=3, length=40, dtype=torch.bfloat16, packed=True, limit=1e-2)


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_the_plain_form(pool: Pool, mode: str) -> None:
    check(pool, mode=mode, ranks=2, length=20, packed=True, kernels={"attention": "reference"})


@pytest.mark.fast
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_rank_has_the_same_work(ranks: int) -> None:
    """Pairs of queries and keys under the causal mask, and under a window; an uneven cut is right but slow."""
    length = 24 * ranks
    for window in (None, 10):
        pairs = []
        for rank in range(ranks):
            region = ContextRegion(Group(tuple(range(ranks)), rank, None))
            seen = ContextAttention(region, select_kernels({}, CPU)).seen(24, None, None, window)
            pairs.append(int((seen.last_BS - seen.first_BS).sum()))
        if window is None:
            assert sum(pairs) == length * (length + 1) // 2 and len(set(pairs)) == 1
        else:
            assert max(pairs) - min(pairs) <= window * window  # the very first rows see less


@pytest.mark.fast
def test_what_a_split_sequence_cannot_do_is_said() -> None:
    region = ContextRegion(Group((0, 1), 0, None))
    attention = ContextAttention(region, select_kernels({}, CPU))
    q, k = torch.randn(4, 1, 2, 8), torch.randn(8, 1, 2, 8)
    for tensors, options in (((q, q, q), {"causal": False}), ((q, q, q), {"return_lse": True}), ((q, k, k), {})):
        with pytest.raises(ValueError, match="causal attention to itself alone"):
            attention(*tensors, **options)
