"""The sharded optimizer against AdamW as its paper writes it, in float64, and what is not decayed or updated."""

import dataclasses

import pytest
import torch
from torch import nn

from megalite.config import OptimizerConfig
from megalite.kernels import select_kernels
from megalite.mesh import Group, Mesh
from megalite.optim.adamw import AdamW
from megalite.optim.grad_norm import GradientNorm
from megalite.optim.optimizer import Optimizer
from megalite.optim.shard import segments_of
from megalite.parallel.zero import StageBuckets
from megalite.placement import Box, PlacedParameter, Placement, row_box

pytestmark = pytest.mark.fast

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-5)
KERNELS = select_kernels({}, torch.device("cpu"))
# The optimizer's way through a kernel, with the kernel's plain form in its place.
BY_KERNEL = dataclasses.replace(KERNELS, choices={**KERNELS.choices, "adamw": "triton"})


def silent_group(ranks, rank):
    return Group(ranks, rank, None)


def stage_of(mesh, dtype=torch.float32, bucket_elements=1 << 20):
    module = nn.Module()
    for name, shape in {"matrix": (9, 7), "norm": (13,), "bias": (5,), "head": (3, 4)}.items():
        box = row_box(name, shape, 0, shape[0], 0, (mesh.rank,))
        module.register_parameter(name, PlacedParameter(torch.randn(shape).to(dtype), Placement((box,))))
    return module, StageBuckets(module, mesh, zero=1, bucket_elements=bucket_elements)


def optimizer_of(buckets, config, kernels):
    return Optimizer([buckets], segments_of([buckets]), AdamW(config, kernels, buckets.mesh))


@pytest.mark.parametrize("kernels", [KERNELS, BY_KERNEL], ids=["library", "kernel"])
@pytest.mark.parametrize("bucket_elements", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_steps_as_in_the_paper(dtype, bucket_elements, kernels):
    module, buckets = stage_of(Mesh(), dtype, bucket_elements)
    optimizer = optimizer_of(buckets, CONFIG, kernels)
    weights = {name: value.detach().double() for name, value in module.named_parameters()}
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(1, 6):
        lr, scale = 0.1 / step, 1.0 / step
        buckets.begin(1)
        for name, parameter in module.named_parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape))
            gradient = parameter.main_grad.double() * scale
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            weights[name] *= 1 - lr * (0.3 if parameter.dim() > 1 else 0.0)
            unbiased = mean[name] / (1 - 0.8**step), square[name] / (1 - 0.95**step)
            weights[name] -= lr * unbiased[0] / (unbiased[1].sqrt() + 1e-5)
        optimizer.step(lr, scale)
    assert optimizer.step_count == 5
    for name, parameter in module.named_parameters():
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(parameter.detach().double(), weights[name], **near)


def test_bf16_keeps_what_it_cannot_show():
    """Steps far below bf16's resolution add up in the fp32 master weights."""
    module, buckets = stage_of(Mesh(), torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    config = OptimizerConfig(weight_decay=0.0, beta1=0.0, beta2=0.0, eps=1e-12)
    optimizer = optimizer_of(buckets, config, KERNELS)
    for _ in range(40):
        buckets.begin(1)
        for parameter in module.parameters():
            parameter.main_grad.fill_(1.0)
        optimizer.step(2e-4, 1.0)
    for parameter in module.parameters():
        torch.testing.assert_close(parameter.detach().float(), torch.full(parameter.shape, 0.992), rtol=0, atol=2**-8)
        assert (parameter < 1).all()


def test_restart_takes_the_parameters_as_they_are():
    module, buckets = stage_of(Mesh(), torch.bfloat16)
    optimizer = optimizer_of(buckets, CONFIG, KERNELS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(3.0)
    optimizer.restart()
    for segment in optimizer.segments:
        segment.write_back()
    assert all((parameter == 3).all() for parameter in module.parameters())


@pytest.mark.parametrize("dp", [1, 2, 3, 7])
def test_segments_describe_every_element_once(dp):
    """Over all data ranks the pieces tile the global tensors, and each piece is where it says it is."""
    whole = {}
    for rank in range(dp):
        module, buckets = stage_of(Mesh(dp=dp, rank=rank, make_group=silent_group))
        numbers = {
            name: torch.arange(value.numel()).float().view(value.shape) for name, value in module.named_parameters()
        }
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(numbers[name])
        for segment in optimizer_of(buckets, CONFIG, KERNELS).segments:
            for box, part in segment.pieces():
                values = segment.master.detach()[part].view(box.size)
                assert torch.equal(values, box.of(numbers[box.name]))
                assert segment.bucket.decays == (len(box.shape) > 1)
                seen = whole.setdefault(box.name, torch.zeros(box.shape))
                box.of(seen).add_(1)
    assert len(whole) == 4 and all((count == 1).all() for count in whole.values())


def test_norm_counts_owned_boxes_and_no_padding():
    """Two boxes in one parameter, of which another rank owns the second; the rest is padding."""
    mesh = Mesh(tp=2, rank=1, make_group=silent_group)
    mine = Box("mine", (4, 6), (0, 2), (4, 3), (0, 0), (1,))
    other = Box("other", (4, 6), (0, 0), (4, 2), (0, 3), (0, 1))
    module = nn.Module()
    module.register_parameter("w", PlacedParameter(torch.randn(4, 7), Placement((mine, other))))
    module.register_parameter("v", PlacedParameter(torch.randn(5), Placement((row_box("v", (5,), 0, 5, 0, (1,)),))))
    buckets = StageBuckets(module, mesh, zero=1)
    norm = GradientNorm([buckets], 1, KERNELS)
    for parameter in module.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape))
    expected = module.w.main_grad[:, :3].double().square().sum() + module.v.main_grad.double().square().sum()
    torch.testing.assert_close(norm.local_square_sum(), expected, rtol=1e-9, atol=0.0)
