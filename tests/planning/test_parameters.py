"""Parameters and FLOPs: the planner's closed forms against the model's own parameters, and published numbers."""

import dataclasses
import random

import pytest
import torch

from benchmarks.planner.published import flops_points, gpt, parameter_points
from megalite.config import ModelConfig
from megalite.mesh import Mesh
from megalite.model.attention import GroupedQueryAttention
from megalite.model.cost import output_in_layers, parameter_count, training_flops_per_token
from megalite.model.decoder import Stage
from megalite.model.families import family_of_config
from megalite.placement import placed_parameters, row_box
from megalite.planning.architecture import Architecture
from megalite.planning.hardware import DEVICES
from megalite.planning.job import Job
from megalite.planning.states import stage_elements
from tests.planning.saved import plain_kernels, silent_mesh

pytestmark = pytest.mark.fast

CUT_OFF = {"GPT 1.7 B (Megatron H100)", "LLaMA 65B", "Llama 3 405B"}
"""1.754, 65.286 and 405.85 billion, published without their last digit."""


def some_model(draw: random.Random) -> ModelConfig:
    return (some_latent_model if draw.random() < 0.3 else some_grouped_model)(draw)


def some_grouped_model(draw: random.Random) -> ModelConfig:
    kv_heads = draw.choice((1, 2, 3, 6))
    return ModelConfig(
        layers=draw.randint(8, 11),
        hidden_size=draw.randint(10, 40),
        ffn_hidden_size=12 * draw.randint(2, 6),
        heads=kv_heads * (12 // kv_heads),
        kv_heads=kv_heads,
        head_dim=2 * draw.randint(1, 5),
        vocab_size=draw.randint(30, 3000),
        max_positions=16,
        tie_embeddings=draw.random() < 0.5,
        qk_norm=draw.random() < 0.5,
        qk_norm_scope=draw.choice(("head", "all_heads")),
        zero_centered_norm=draw.random() < 0.5,
        block=draw.choice(("pre_norm", "reordered_norm", "sandwich_norm")),
        feed_forward=draw.choice(("swiglu", "geglu")),
        attention_bias=draw.random() < 0.5,
    )


def some_latent_model(draw: random.Random) -> ModelConfig:
    return ModelConfig(
        layers=draw.randint(8, 11),
        hidden_size=draw.randint(10, 40),
        ffn_hidden_size=12 * draw.randint(2, 6),
        heads=12,
        attention="mla",
        q_lora_rank=draw.choice((0, draw.randint(2, 9))),
        kv_lora_rank=draw.randint(2, 9),
        qk_nope_head_dim=draw.randint(2, 9),
        qk_rope_head_dim=2 * draw.randint(1, 4),
        v_head_dim=draw.randint(2, 9),
        vocab_size=draw.randint(30, 3000),
        max_positions=16,
    )


def built_elements(job: Job, stage: int, mesh: Mesh) -> int:
    """Elements that the stage's real parameters have on one rank, a tied output layer not counted again."""
    model = job.architecture.model
    first = Stage(model, mesh, plain_kernels(), stage=0, owners=job.owners, sequence=mesh.tp > 1)
    embedding = first.embedding if job.owners[0] == job.owners[stage] else None
    built = Stage(
        model, mesh, plain_kernels(), stage=stage, owners=job.owners, sequence=mesh.tp > 1, embedding=embedding
    )
    return sum(parameter.numel() for parameter in placed_parameters(built) if parameter.tied_to is None)


@pytest.mark.parametrize(
    "tensor, pipeline, schedule, chunks",
    [
        (1, 1, "1f1b", 1),
        (4, 1, "1f1b", 1),
        (3, 2, "1f1b", 1),
        (2, 2, "interleaved", 3),
        (12, 4, "gpipe", 1),
        (2, 3, "zb_v", 2),
    ],
)
def test_a_stage_holds_the_elements_of_its_parameters(tensor, pipeline, schedule, chunks):
    draw = random.Random()
    model = some_model(draw)
    job = Job(
        architecture=Architecture(model),
        device=DEVICES["h100"],
        seq_length=12,
        micro_batch_size=1,
        micro_batches=pipeline,
        tensor=tensor,
        pipeline=pipeline,
        schedule=schedule,
        virtual_stages=chunks,
    )
    for stage, owner in enumerate(job.owners):
        mesh = silent_mesh(tp=tensor, pp=pipeline, rank=owner * tensor)
        ranks = [silent_mesh(tp=tensor, pp=pipeline, rank=mesh.rank_at(tp=index)) for index in range(tensor)]
        held = [built_elements(job, stage, rank) for rank in ranks]
        assert stage_elements(job, stage) == max(held), (model, stage)
        index = draw.randrange(tensor)
        own, fullest = job.architecture.layer(tensor, index), job.architecture.layer(tensor)
        assert held[index] == max(held) - job.layers[stage] * (fullest.sizes.elements - own.sizes.elements)


def test_the_whole_model_is_the_sum_of_its_parts():
    model = some_model(random.Random())
    built = Stage(model, silent_mesh(), plain_kernels(), dtype=torch.float32)
    count = sum(parameter.numel() for parameter in placed_parameters(built) if parameter.tied_to is None)
    assert Architecture(model).parameters == count


class GatedAttention(GroupedQueryAttention):
    """Attention with one matrix and one vector more, as a new kind of layer would add them."""

    def __init__(self, build, layer):
        super().__init__(build, layer)
        model, mesh = build.model, build.mesh
        width, prefix = model.heads * model.head_dim, f"model.layers.{layer}.self_attn"
        place = (mesh.index("tp") * width // mesh.tp, width // mesh.tp, 0, (mesh.rank,))
        weight, bias = (
            row_box(f"{prefix}.gate.{kind}", (width, *rest), *place)
            for kind, rest in (("weight", (model.hidden_size,)), ("bias", ()))
        )
        self.gate = build.column((weight,), (bias,))


def test_a_new_tensor_in_a_layer_is_counted_everywhere():
    model = dataclasses.replace(some_grouped_model(random.Random()), norm_eps=0.25)
    plain = [parameter_count(model), training_flops_per_token(model, 8), output_in_layers(model)]
    model = dataclasses.replace(model, attention=f"{__name__}:GatedAttention")
    built = Stage(model, silent_mesh(), plain_kernels(), dtype=torch.float32)
    count = sum(parameter.numel() for parameter in placed_parameters(built) if parameter.tied_to is None)
    width = model.heads * model.head_dim
    weights = model.layers * model.hidden_size * width
    assert (
        parameter_count(model) == Architecture(model).parameters == count == plain[0] + weights + model.layers * width
    )
    assert training_flops_per_token(model, 8) == plain[1] + 6 * weights
    assert output_in_layers(model) < plain[2]
    job = Job(Architecture(model), DEVICES["h100"], 12, 1, 4, tensor=4, sequence=True)
    assert stage_elements(job, 0) == max(built_elements(job, 0, silent_mesh(tp=4, rank=rank)) for rank in range(4))
    assert len(job.layer.sizes.matrices) == 5


def test_flops_are_those_that_the_trainer_reports():
    model, length = some_model(random.Random()), random.randint(5, 5000)
    architecture = Architecture(model)
    assert architecture.flops_per_token(length, "full") == training_flops_per_token(model, length)
    attention = 3 * model.layers * model.heads * (model.head_dim + model.value_dim) * length
    assert training_flops_per_token(model, length) - architecture.flops_per_token(length, "half") == attention


def test_recomputation_of_whole_layers_is_narayanans_formula():
    """96 B s l h^2 (1 + s / 6h + V / 16 l h): arXiv:2104.04473, equation 3."""
    layers, hidden, length, vocabulary = 24, 2304, 2048, 51200
    published = 96 * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    ours = length * gpt(layers, hidden, 24, vocabulary, length).flops_per_token(length, "full", "full")
    assert ours == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("point", parameter_points(), ids=lambda point: point.name)
def test_published_parameters(point):
    if point.name in CUT_OFF:
        assert point.predicted == pytest.approx(point.published, abs=1 if point.published > 100 else 0.1001)
    else:
        assert point.predicted == point.published


DEEPSEEK = {
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "vocab_size": 102400,
        },
        15_706_484_224,
        2.7e9,
    ),
    "DeepSeek-V3": ({"model_type": "deepseek_v3"}, 671_026_419_200, 37.6e9),
}
"""config.json as published (arXiv:2405.04434, arXiv:2412.19437), all parameters, those that a token uses; V3's without
the layer for further tokens."""


@pytest.mark.parametrize("name", DEEPSEEK)
def test_published_parameters_of_latent_attention(name):
    fields, parameters, used = DEEPSEEK[name]
    model = family_of_config(fields, name).read_config(fields, name)
    architecture = Architecture(model)
    assert architecture.parameters == parameters
    embedding = model.vocab_size * model.hidden_size
    assert architecture.matmul_parameters + embedding == pytest.approx(used, rel=2e-3 if used > 1e10 else 2e-2)
    # QK^T is 192 wide, PV 128.
    attention = 6 * model.layers * model.heads * (192 + 128) * 4096
    assert architecture.flops_per_token(4096) == 6 * architecture.matmul_parameters + attention
    layer = architecture.layer(tensor=8)
    assert (layer.cached, layer.query, layer.mixed) == (576, model.heads // 8 * 192, model.heads // 8 * 128)


@pytest.mark.parametrize("point", flops_points(), ids=lambda point: point.name)
def test_published_flops(point):
    rounding = 0.5 / 33 if "33%" in point.name else 0.0  # a share in whole percent
    assert abs(point.error) < 0.02 + rounding
