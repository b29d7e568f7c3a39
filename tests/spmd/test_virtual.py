"""What the types of one rank cannot show: whole steps with all ranks in this process, against one rank alone.

Buckets whose gradients accumulate and are reduced under ZeRO, pipeline schedules, tied weights, heads that several
ranks share, the gradient norm, and which rank's loss counts. Gradients of the first step, weights after the last,
losses, norms and metrics are compared as `tests/support/parity.py` does.
"""

from __future__ import annotations

import pytest
import torch

from megalite.mesh import Mesh
from tests.parallel.test_seams import FOCAL, REGRESSION
from tests.support.parity import EVERYTHING, Case, Layout, assert_close, assert_same_bits, train_alone, train_virtually
from tests.support.virtual import Stuck, World

MOE = {
    "model.experts": 4,
    "model.experts_per_token": 2,
    "model.expert_ffn_hidden_size": 12,
    "model.aux_loss": 0.1,
    "model.router_z_loss": 0.01,
    "model.shared_experts": 1,
}
BIASED = MOE | {"model.router": "sigmoid", "model.router_bias_rate": 0.01, "train.recompute": "full"}

CASES = {
    "plain": Case.of(steps=3),
    "everything": Case.of(EVERYTHING | {"model.layers": 4}, steps=2),
    "documents": Case.of({"data.document_mask": True}, steps=2, documents=True),
    "experts": Case.of(MOE | {"train.global_batch_size": 8}, steps=2),
    "biased": Case.of(BIASED | {"train.global_batch_size": 8}, steps=2),
    "log-probabilities": Case.of(steps=2, objective=FOCAL),
    "values": Case.of(steps=2, objective=REGRESSION),
    "lora": Case.of({"adapter.kind": "lora", "adapter.rank": 2}, steps=3),
    "norm of all heads": Case.of({"model.qk_norm": True, "model.qk_norm_scope": "all_heads"}, steps=2),
    "muon": Case.of({"optimizer.kind": "muon"}, steps=2),
}

LAYOUTS = {
    "t2": Layout(tensor=2),
    "t2s": Layout(tensor=2, sequence=True),
    "t4s-d2": Layout(tensor=4, sequence=True, data=2),
    "d2-z0": Layout(data=2, zero=0),
    "d2-z1": Layout(data=2, zero=1),
    "d2-z2": Layout(data=2, zero=2),
    "d4-z3": Layout(data=4, zero=3),
    "p2-1f1b": Layout(pipeline=2),
    "p2-zb_h1": Layout(pipeline=2, schedule="zb_h1"),
    "p2-zb_v": Layout(pipeline=2, schedule="zb_v"),
    "t2s-p3-d2": Layout(tensor=2, sequence=True, pipeline=3, data=2, zero=2),
    "t2-c2": Layout(tensor=2, context=2, mode="ring"),
    "d2-c2": Layout(data=2, context=2, mode="ulysses"),
    "t2s-c3": Layout(tensor=2, sequence=True, context=3),
    "t2s-d2-e2": Layout(tensor=2, sequence=True, data=2, expert=2),
    "t2-d2-e2": Layout(tensor=2, data=2, expert=2, zero=0),
    "d4-c2-e2": Layout(data=4, context=2, expert=2, zero=2),
}

PAIRS = [
    *(("plain", name) for name in ("t2", "t2s", "d2-z0", "d2-z2", "d4-z3", "p2-zb_h1", "t2-c2", "d2-c2")),
    *(("everything", name) for name in ("t2", "t4s-d2", "p2-1f1b", "t2s-p3-d2", "p2-zb_v", "t2s-c3")),
    *(("documents", name) for name in ("t2-c2", "d2-z1")),
    *(("experts", name) for name in ("t2s-d2-e2", "t2-d2-e2", "d4-c2-e2")),
    *(("biased", name) for name in ("t2s-d2-e2", "t2")),
    *(("log-probabilities", name) for name in ("t2s-c3", "d2-z1", "p2-1f1b")),
    *(("values", name) for name in ("t2s", "t2-c2")),
    *(("lora", name) for name in ("t2", "t2s", "d2-z1")),
    *(("norm of all heads", name) for name in ("t2", "t4s-d2")),
    ("muon", "d2-z1"),
]


def tolerance(case: str) -> float:
    """Muon's updates have the size of the learning rate whatever the gradient's: rounding shows more."""
    return 1e-3 if case == "muon" else 1e-5


@pytest.mark.parametrize("case, layout", PAIRS)
def test_a_layout_against_one_rank(case, layout):
    assert_close(train_virtually(CASES[case], LAYOUTS[layout]), train_alone(CASES[case]), tolerance(case))


@pytest.mark.parametrize("layout", ["p2-1f1b", "p2-zb_h1", "p2-zb_v"])
def test_pipelines_give_the_same_bits(layout):
    assert_same_bits(train_virtually(CASES["everything"], LAYOUTS[layout]), train_alone(CASES["everything"]))


WIDE = {
    "model.layers": 8,
    "model.hidden_size": 16,
    "model.ffn_hidden_size": 40,
    "model.heads": 16,
    "model.kv_heads": 4,
    "model.tie_embeddings": True,
    "model.qk_norm": True,
    "train.seq_length": 16,
    "train.global_batch_size": 16,
}


@pytest.mark.slow
def test_a_step_on_512_ranks():
    case = Case.of(WIDE, steps=1)
    layout = Layout(tensor=8, sequence=True, pipeline=8, data=8, zero=2)
    assert_close(train_virtually(case, layout), train_alone(case))


@pytest.mark.fast
def test_ranks_that_wait_for_each_other_are_named():
    def wait(rank, make):
        Mesh(tp=2, rank=rank, make_group=make).group("tp").receive(torch.ones(1), 1 - rank).wait()

    with pytest.raises(Stuck, match=r"0: 'a tensor from rank 1 .* 1: 'a tensor from rank 0"):
        World(2).run(wait)


@pytest.mark.fast
def test_different_collectives_are_named():
    def call(rank, make):
        group = Mesh(tp=2, rank=rank, make_group=make).group("tp")
        group.all_reduce(torch.ones(2 + rank)).wait()

    with pytest.raises(Stuck, match=r"rank 1 calls .*3.* where others of .* call .*2"):
        World(2).run(call)
