"""Types of whole steps on meshes of up to 8 x 8 x 8 ranks; see `tests/spmd/typed.py`."""

from __future__ import annotations

import inspect

import pytest

from megalite.mesh import Mesh
from megalite.objective.policy import ClippedPolicy, ClippedValue
from megalite.objective.preference import DPO, BradleyTerry
from tests.parallel.test_seams import FOCAL, REGRESSION
from tests.spmd.typed import LETTERS, SpmdTypeError, check_step, functions, is_local, parse
from tests.support.parity import Case, Layout

SIZES = {
    "model.layers": 8,
    "model.hidden_size": 16,
    "model.ffn_hidden_size": 32,
    "model.heads": 16,
    "model.kv_heads": 8,
    "model.head_dim": 4,
    "model.vocab_size": 64,
    "model.max_positions": 64,
    "train.seq_length": 32,
}
EXPERTS = {
    "model.experts": 16,
    "model.experts_per_token": 2,
    "model.expert_ffn_hidden_size": 16,
    "model.shared_experts": 1,
    "model.aux_loss": 0.1,
    "model.router_z_loss": 0.01,
}
BIASED = EXPERTS | {"model.router": "sigmoid", "model.router_bias_rate": 0.01}

FEATURES = {
    "plain": {},
    "norm of each head": {"model.qk_norm": True},
    "norm of all heads": {"model.qk_norm": True, "model.qk_norm_scope": "all_heads"},
    "biases": {"model.attention_bias": True},
    "tied": {"model.tie_embeddings": True, "train.z_loss": 1e-3},
    "shared heads": {"model.kv_heads": 2},
    "latent attention": {
        "model.attention": "mla",
        "model.kv_heads": 16,
        "model.q_lora_rank": 8,
        "model.kv_lora_rank": 8,
        "model.qk_nope_head_dim": 2,
        "model.qk_rope_head_dim": 2,
        "model.v_head_dim": 4,
    },
    "lora": {"adapter.kind": "lora", "adapter.rank": 2},
    "gemma": {
        "model.block": "sandwich_norm",
        "model.final_logit_softcapping": 3.0,
        "model.attn_logit_softcapping": 3.0,
        "model.embedding_multiplier": 2.0,
        "model.zero_centered_norm": True,
    },
    "reordered norms": {"model.block": "reordered_norm"},
    "selective": {"train.recompute": "selective"},
    "full": {"train.recompute": "full"},
}
OBJECTIVES = {
    "focal": FOCAL,
    "regression": REGRESSION,
    "dpo": DPO(),
    "ipo": DPO(loss="ipo"),
    "reward": BradleyTerry(center=0.1),
    "policy": ClippedPolicy(kl=0.1),
    "policy by answer": ClippedPolicy(loss_over="sequence"),
    "value": ClippedValue(),
}


def check(layout, fields=None, rank=0, objective=None):
    fields = SIZES | {"train.global_batch_size": 2 * layout.data} | layout.fields | dict(fields or {})
    config = Case.of(fields).config(layout.world)
    parallel = config.parallel
    sizes = {"dp": layout.data // parallel.expert, "ep": parallel.expert, "cp": parallel.context, "tp": parallel.tensor}
    return check_step(config, Mesh(pp=parallel.pipeline, **sizes, rank=rank), objective)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.fast), *list(FEATURES)[1:]])
def test_a_step_on_512_ranks(name, sequence):
    layout = Layout(tensor=8, sequence=sequence, pipeline=8, data=8)
    for rank in (0, 8 * 8 * 4 + 11, 511):  # a first, a middle and the last stage
        check(layout, FEATURES[name], rank)


@pytest.mark.parametrize("name", ["plain", "selective", "lora"])
def test_communication_in_pieces(name):
    for rank in (0, 8 * 8 * 4 + 11, 511):
        layout = Layout(tensor=8, sequence=True, pipeline=8, data=8)
        check(layout, FEATURES[name] | {"parallel.tensor_overlap_splits": 2}, rank)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, sequence):
    check(Layout(tensor=8, sequence=sequence, data=8), objective=OBJECTIVES[name])
    check(Layout(tensor=2, sequence=sequence, data=8, context=8), objective=OBJECTIVES[name])


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("mode", ["gather", "ring", "ulysses"])
def test_a_split_sequence(mode, sequence):
    layout = Layout(tensor=2, sequence=sequence, data=8, context=8, mode=mode)
    check(layout)
    check(layout, {"data.document_mask": True})


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("expert", [1, 2, 8])
def test_experts(expert, sequence):
    check(Layout(tensor=8, sequence=sequence, data=8, expert=expert), EXPERTS)
    check(Layout(tensor=2, sequence=sequence, data=8, expert=expert, context=4), BIASED)


@pytest.mark.fast
def test_every_autograd_function_declares_its_types():
    found = set()
    for cls in functions():
        if is_local(cls):
            continue
        found.add(cls.__name__)
        parameters = list(inspect.signature(cls.forward).parameters)
        for name, kind in parse(cls.spmd).items():
            assert name in (*parameters, "out", "data"), f"{cls.__name__}.spmd names {name}"
            assert kind in parameters or set(kind.split("|")) <= LETTERS.keys(), f"{cls.__name__}.spmd: {kind}"
    assert len(found) >= 18


@pytest.mark.fast
def test_what_the_types_refuse(monkeypatch):
    from megalite.parallel.linear import _ColumnLinear

    monkeypatch.setattr(_ColumnLinear, "spmd", "x: R, weight: V, bias: V -> V")
    with pytest.raises(SpmdTypeError, match=r"_ColumnLinear: x is .*I along tp, and declared"):
        check(Layout(tensor=2))
    monkeypatch.setattr(_ColumnLinear, "spmd", "weight: V -> V")
    with pytest.raises(SpmdTypeError, match="declares no type for its argument x"):
        check(Layout(tensor=2))


@pytest.mark.fast
def test_declarations_need_no_package():
    text = [inspect.getsource(inspect.getmodule(cls)) for cls in functions() if not is_local(cls)]
    assert not any("spmd_types" in source for source in text)
