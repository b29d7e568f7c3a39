"""The bytes that a layer keeps for backward are those that autograd saves, kernel by kernel."""

import dataclasses
import random

import pytest
import torch

from megalite.config import ModelConfig
from megalite.planning.activations import layer_kept
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job
from tests.planning.saved import fused_kernels, plain_kernels, saved_bytes, silent_mesh

pytestmark = pytest.mark.fast


def some_job(draw: random.Random, device: str, recompute: str, size: int, tensor: int) -> Job:
    kv_heads = draw.choice((1, 2, 4)) * tensor
    heads = kv_heads * draw.choice((1, 3))
    model = ModelConfig(
        layers=3,
        hidden_size=16 * draw.randint(2, 9),
        ffn_hidden_size=8 * tensor * draw.randint(3, 20),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw.choice((16, 128)),
        vocab_size=50,
        max_positions=128,
        qk_norm=draw.random() < 0.5,
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
        recompute=recompute,
        element_bytes=size,
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
        dtype=torch.bfloat16 if size == 2 else torch.float32,
    )
    assert saved == pytest.approx(layer_kept(job), rel=1e-9), dataclasses.asdict(job.architecture.model)
