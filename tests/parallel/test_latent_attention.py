"""Latent attention: every layout trains what one process trains; the cache holds the latent; heads of two widths."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.generation.cache import DecoderCache
from megalite.kernels import Kernels, select_kernels
from megalite.kernels.attention import attention_reference
from megalite.mesh import Mesh
from megalite.model.adapter import make_adapter
from megalite.model.cost import AdapterConfig
from megalite.model.decoder import Stage
from megalite.model.init import initialise
from megalite.placement import placed_parameters
from tests.support.parity import (
    Case,
    Layout,
    assert_same_bits,
    assert_trains_as_alone,
    distance,
    train_alone,
)

CPU = torch.device("cpu")
LATENT: dict[str, Any] = {
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.head_dim": 11,
    "model.attention": "mla",
    "model.q_lora_rank": 10,
    "model.kv_lora_rank": 6,
    "model.qk_nope_head_dim": 7,
    "model.qk_rope_head_dim": 4,
    "model.v_head_dim": 5,
}
"""DeepSeek-V3's attention; V2-Lite's has no latent of queries."""

LITE = LATENT | {"model.q_lora_rank": 0, "model.v_head_dim": 14, "model.sliding_window": 5}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.7}
EXPERTS = LATENT | {
    "model.experts": 4,
    "model.expert_ffn_hidden_size": 12,
    "model.shared_experts": 1,
    "model.dense_layers": (0,),
    "model.router": "sigmoid",
    "model.router_bias_rate": 0.02,
}
MUON = LATENT | {"optimizer.kind": "muon"}
LORA = LATENT | {"adapter.kind": "lora", "adapter.rank": 3, "adapter.alpha": 5.0}

QUICK = [
    (LATENT, Layout(tensor=2)),
    (LATENT | {"train.recompute": "selective"}, Layout(tensor=2, sequence=True, pipeline=2, schedule="zb_h1")),
    (LITE, Layout(context=2, mode="ring")),
    (LITE | {"train.recompute": "full"}, Layout(data=2, zero=3)),
    (LORA, Layout(tensor=2, sequence=True)),
    (MUON, Layout(tensor=2, sequence=True, data=2, zero=2)),
]
OTHERS = [
    (LITE, Layout(tensor=2, sequence=True)),
    (LATENT | {"model.layers": 4}, Layout(pipeline=2, schedule="zb_v")),
    (LATENT, Layout(context=2, mode="gather")),
    (LATENT, Layout(context=2, mode="ulysses")),
    (LITE, Layout(tensor=2, sequence=True, context=2, mode="ulysses")),
    (EXPERTS, Layout(tensor=2, sequence=True, data=2, expert=2, zero=3)),
    (LORA, Layout(tensor=2)),
    (LORA, Layout(pipeline=2, data=2, zero=3)),
    (LATENT, Layout(tensor=4, sequence=True)),
]
KINDS = {id(LATENT): "v3", id(LITE): "lite", id(EXPERTS): "experts", id(MUON): "muon", id(LORA): "lora"}


def _named(fields: dict[str, Any], layout: Layout) -> str:
    kind = KINDS.get(id(fields)) or f"{'v3' if fields['model.q_lora_rank'] else 'lite'}-{list(fields.values())[-1]}"
    return f"{kind}-{layout.name}"


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        *(pytest.param(*case, id=_named(*case)) for case in QUICK),
        *(pytest.param(*case, id=_named(*case), marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_every_layout_trains_the_same(fields: dict[str, Any], layout: Layout) -> None:
    """With documents in the rows, among messages that arrive late."""
    case = Case.of(fields, steps=4, documents=layout.context == 1)
    assert_trains_as_alone(case, layout)


@pytest.mark.fast
@pytest.mark.parametrize("fields", [LATENT, LITE], ids=["v3", "lite"])
def test_recomputation_changes_nothing(fields: dict[str, Any]) -> None:
    case = Case.of(fields, steps=2, documents=True)
    kept = train_alone(case)
    for recompute in ("selective", "full"):
        assert_same_bits(train_alone(case.having({"train.recompute": recompute})), kept)


def _model(**fields: Any) -> ModelConfig:
    latent = {path.removeprefix("model."): value for path, value in LATENT.items()}
    sizes = {"layers": 2, "hidden_size": 20, "ffn_hidden_size": 24, "vocab_size": 37, "max_positions": 32}
    return ModelConfig(**{**sizes, **latent, "rope_scaling": YARN, **fields})


def _stage(model: ModelConfig, kernels: Kernels, adapter: AdapterConfig | None = None) -> Stage:
    stage = Stage(model, Mesh(), kernels, adapter=None if adapter is None else make_adapter(adapter))
    initialise(stage, seed=3)
    for parameter in placed_parameters(stage):  # B of an adapter begins as zeros
        if parameter.placement.role == "adapter":
            torch.nn.init.normal_(parameter, std=0.1)
    return stage


@pytest.mark.fast
def test_documents_do_not_see_each_other() -> None:
    """Two in one row give what each gives alone."""
    stage = _stage(_model(), select_kernels({}, CPU))
    ids_BS, first = torch.randint(37, (2, 19)), 8
    numbers_BS = (torch.arange(19) >= first).long().expand(2, -1)
    positions_BS = torch.arange(19).expand(2, -1) - first * numbers_BS
    packed_SBH = stage(ids_BS, stage.positions(19, positions_BS=positions_BS, documents_BS=numbers_BS))
    for part in (slice(0, first), slice(first, 19)):
        alone_SBH = stage(ids_BS[:, part], stage.positions(part.stop - part.start))
        torch.testing.assert_close(packed_SBH[part], alone_SBH, atol=1e-5, rtol=0)


@pytest.mark.fast
@pytest.mark.parametrize("adapter", [None, AdapterConfig("lora", rank=3)], ids=["absorbed", "with an adapter"])
@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 0, "sliding_window": 5, "v_head_dim": 13}], ids=["v3", "lite"])
def test_the_cache_holds_the_latent(fields: dict[str, Any], adapter: AdapterConfig | None) -> None:
    """A prompt and then token by token: the hidden states of the whole sequence, from R + r numbers a token."""
    model, ids_BS = _model(**fields), torch.randint(37, (3, 17))
    stage, cache = _stage(model, select_kernels({}, CPU), adapter), DecoderCache(17)
    with torch.no_grad():
        whole_SBH = stage(ids_BS, stage.positions(17))
        parts, start = [], 0
        for length in (6, 4, *[1] * 7):
            ids = ids_BS[:, start : start + length]
            parts.append(stage(ids, stage.positions(length, start), cache))
            start += length
    torch.testing.assert_close(torch.cat(parts), whole_SBH, atol=1e-5, rtol=0)
    elements = sum(buffer.numel() for buffers in cache._buffers.values() for buffer in buffers)
    assert elements == model.layers * 17 * 3 * (model.kv_lora_rank + model.qk_rope_head_dim)


def _gradients(attention: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attention(*leaves, **options)
    assert out.shape == (*tensors[0].shape[:3], tensors[2].shape[-1])
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.fast
@pytest.mark.parametrize("taken", ["cpu", "sdpa"])
def test_values_of_another_width(taken: str) -> None:
    """Narrower and wider than keys, output and gradients as the formula has them."""
    attention = select_kernels({"attention": taken}, CPU).attention
    for width, value in ((12, 5), (6, 10)):
        heads, length = random.choice(((4, 4), (6, 2))), random.randint(3, 40)
        sizes = ((heads[0], width), (heads[1], width), (heads[1], value))
        tensors = [torch.randn(length, 2, *size) for size in sizes]
        for options in ({}, {"window": 4}, {"scale": 0.7, "softcap": 1.5}):
            expected = _gradients(attention_reference, tensors, **options)
            for ours, theirs in zip(_gradients(attention, tensors, **options), expected, strict=True):
                assert distance(ours, theirs) < 1e-5
