"""The bytes that a layer keeps for backward are those that autograd saves, kernel by kernel."""

import dataclasses
import random
from typing import Any

import pytest
import torch

from megalite.config import AdapterConfig, ModelConfig
from megalite.planning.activations import layer_kept
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job
from tests.planning.saved import fused_kernels, plain_kernels, saved_bytes, silent_mesh

pytestmark = pytest.mark.fast


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LATENT_LAYERS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "down_proj")
SPLIT = [("fused", 2, {"context": 2, "context_mode": mode}) for mode in ("gather", "ring", "ulysses")]


def some_job(draw: random.Random, device: str, recompute: str, size: int, tensor: int, **context: Any) -> Job:
    kv_heads = draw.choice((1, 2, 4)) * tensor
    heads = kv_heads * draw.choice((1, 3)) * (2 if context else 1)
    model = ModelConfig(
        layers=3,
        hidden_size=16 * draw.randint(2, 9),
        ffn_hidden_size=8 * tensor * draw.randint(3, 20),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw.choice((16,) if context else (16, 128)),  # on CPUs with AMX, wide heads in bf16 keep all scores
        vocab_size=50,
        max_positions=128,
        qk_norm=draw.random() < 0.5,
        qk_norm_scope=draw.choice(("head", "all_heads")),
        zero_centered_norm=draw.random() < 0.5,
        block=draw.choice(("pre_norm", "reordered_norm", "sandwich_norm")),
        feed_forward=draw.choice(("swiglu", "geglu")),
        attention_bias=draw.random() < 0.5,
    )
    return Job(
        architecture=Architecture(model),
        device=DEVICES[device],
        seq_length=32 * draw.randint(1, 3),
        micro_batch_size=draw.randint(1, 3),
        micro_batches=1,
        tensor=tensor,
        sequence=tensor > 1,
        keep_gathered=tensor > 1 and draw.random() < 0.5,
        recompute=recompute,
        element_bytes=size,
        **context,
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kernels, tensor", [("plain", 1), ("fused", 1), ("fused", 2)])
def test_a_layer_keeps_what_autograd_saves(kernels, tensor, size, recompute, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # the planner's CPUs have AMX units
    draw = random.Random()
    device = "cpu" if kernels == "plain" else "h100"
    job = some_job(draw, device, recompute, size, tensor)
    mesh = silent_mesh(torch.device("cpu" if kernels == "plain" else "meta"), tp=tensor)
    saved = saved_bytes(
        job.architecture.model,
        mesh,
        plain_kernels() if kernels == "plain" else fused_kernels(),
        tokens=(job.seq_length, job.micro_batch_size),
        recompute=recompute,
        keeps=job.keep_gathered,
        dtype=torch.bfloat16 if size == 2 else torch.float32,
    )
    assert saved == pytest.approx(layer_kept(job), rel=1e-9), dataclasses.asdict(job.architecture.model)


def latent_job(draw: random.Random, device: str, recompute: str, size: int, tensor: int, **context: Any) -> Job:
    heads = 2 * tensor * draw.randint(1, 3)
    plain, rotated = draw.randint(3, 20), 2 * draw.randint(1, 5)
    latent = {
        "attention": "mla",
        "head_dim": plain + rotated,
        "q_lora_rank": draw.choice((0, 8 * draw.randint(1, 4))),
        "kv_lora_rank": 8 * draw.randint(1, 4),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotated,
        "v_head_dim": draw.choice((plain, plain + rotated, plain + rotated + 2)),
        "qk_norm": False,
        "attention_bias": False,
        "zero_centered_norm": False,
    }
    job = some_job(draw, device, recompute, size, tensor, **context)
    model = dataclasses.replace(job.architecture.model, heads=heads, kv_heads=heads, **latent)
    return dataclasses.replace(job, architecture=Architecture(model))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kernels, tensor, context", [("plain", 1, {}), ("fused", 1, {}), ("fused", 2, {}), *SPLIT])
def test_latent_attention_keeps_what_autograd_saves(kernels, tensor, context, recompute):
    draw = random.Random()
    size = draw.choice((2, 4))
    job = latent_job(draw, "cpu" if kernels == "plain" else "h100", recompute, size, tensor, **context)
    adapter = AdapterConfig("lora", rank=3, targets=tuple(draw.sample(LATENT_LAYERS, 3)))
    if job.architecture.model.q_lora_rank and draw.random() < 0.5:
        job = dataclasses.replace(job, architecture=Architecture(job.architecture.model, adapter))
    saved = saved_bytes(
        job.architecture.model,
        silent_mesh(torch.device("cpu" if kernels == "plain" else "meta"), tp=tensor, cp=job.context),
        plain_kernels() if kernels == "plain" else fused_kernels(),
        tokens=(job.seq_length, job.micro_batch_size),
        recompute=recompute,
        keeps=job.keep_gathered,
        dtype=torch.bfloat16 if size == 2 else torch.float32,
        mode=job.context_mode,
        adapter=job.architecture.adapter,
    )
    indices = 8 * 5 * job.layer.queries if context.get("context_mode") == "ulysses" else 0
    assert saved == pytest.approx(layer_kept(job), rel=1e-9, abs=indices), (job.architecture, job.context_mode)


@pytest.mark.parametrize("size", [2, 4])
def test_bounded_scores_are_kept_on_cpus(size):
    """Attention is written out then, with two fp32 numbers for each score; the planner counts heads as copied that
    some shapes only view."""
    job = some_job(random.Random(), "cpu", "none", size, 1)
    model = dataclasses.replace(job.architecture.model, attn_logit_softcapping=2.0)
    job = dataclasses.replace(job, architecture=Architecture(model))
    tokens, dtype = (job.seq_length, job.micro_batch_size), torch.bfloat16 if size == 2 else torch.float32
    saved = saved_bytes(
        model, silent_mesh(torch.device("cpu")), plain_kernels(), tokens=tokens, recompute="none", dtype=dtype
    )
    assert 0.7 * layer_kept(job) < saved <= layer_kept(job) + 1, dataclasses.asdict(model)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["gather", "ring", "ulysses"])
@pytest.mark.parametrize("kernels, tensor", [("plain", 1), ("fused", 1), ("fused", 2)])
def test_a_layer_of_a_split_sequence_keeps_what_autograd_saves(kernels, tensor, mode, size, recompute):
    draw = random.Random()
    job = some_job(draw, "cpu" if kernels == "plain" else "h100", recompute, size, tensor, context=2, context_mode=mode)
    saved = saved_bytes(
        job.architecture.model,
        silent_mesh(torch.device("cpu" if kernels == "plain" else "meta"), tp=tensor, cp=2),
        plain_kernels() if kernels == "plain" else fused_kernels(),
        tokens=(job.seq_length, job.micro_batch_size),
        recompute=recompute,
        keeps=job.keep_gathered,
        dtype=torch.bfloat16 if size == 2 else torch.float32,
        mode=mode,
    )
    indices = 8 * (job.layer.queries + 4 * job.layer.kvs) if mode == "ulysses" else 0  # of heads, made once for a stage
    assert saved == pytest.approx(layer_kept(job), rel=1e-9, abs=indices), dataclasses.asdict(job.architecture.model)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kernels, tensor", [("plain", 1), ("fused", 1), ("fused", 2)])
def test_a_layer_with_an_adapter_keeps_what_autograd_saves(kernels, tensor, recompute, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    draw = random.Random()
    targets = tuple(draw.sample(LAYERS, draw.randint(1, 7)))
    adapter = AdapterConfig("lora", rank=draw.randint(1, 9), targets=targets)
    job = some_job(draw, "cpu" if kernels == "plain" else "h100", recompute, 2, tensor)
    job = dataclasses.replace(job, architecture=Architecture(job.architecture.model, adapter))
    saved = saved_bytes(
        job.architecture.model,
        silent_mesh(torch.device("cpu" if kernels == "plain" else "meta"), tp=tensor),
        plain_kernels() if kernels == "plain" else fused_kernels(),
        tokens=(job.seq_length, job.micro_batch_size),
        recompute=recompute,
        keeps=job.keep_gathered,
        dtype=torch.bfloat16,
        adapter=adapter,
    )
    assert saved == pytest.approx(layer_kept(job), rel=1e-9), (adapter, dataclasses.asdict(job.architecture.model))
