"""Attention with specialised warps, against the float64 reference: on Hopper, and in the emulator of Gluon."""

import pytest
import torch

from megalite.kernels.attention import attention_reference
from megalite.kernels.attention.call import Call
from megalite.kernels.attention.trial import admitted
from tests.kernels.gluon_emulator import Emulated
from tests.kernels.suite.kernel_checks import compare
from tests.kernels.suite.test_attention_kernels import check_the_rule

ours = pytest.importorskip("megalite.kernels.attention.flash_gluon", reason="this triton has another Gluon")
kernels = pytest.importorskip("megalite.kernels.attention.flash_gluon_kernels")
backward = pytest.importorskip("megalite.kernels.attention.flash_gluon_backward_kernels")

TRAINED = [Call(1024, 1024, 1, 8, 2, width, torch.bfloat16, gradients=True) for width in (64, 128)]


@pytest.fixture(scope="session")
def trusted() -> bool:
    """On a GPU a child has to come back with the right numbers first: a wrong barrier would stop this process."""
    return not torch.cuda.is_available() or admitted("gluon", TRAINED, torch.device("cuda"), seconds=60.0) == {*TRAINED}


@pytest.fixture(autouse=True)
def specialised(device, trusted, monkeypatch):
    if device.type == "cpu":
        for module, name in ((kernels, "forward_kernel"), (backward, "dkdv_kernel"), (backward, "dq_kernel")):
            monkeypatch.setattr(ours, name, Emulated(module, name))
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for compute capability 9.0")
    else:
        assert trusted, "the trial in a process of its own did not end well"


def inputs(device, queries, keys, heads, kv_heads, width, dtype=torch.bfloat16):
    shapes = [(queries, 2, heads, width), (keys, 2, kv_heads, width), (keys, 2, kv_heads, width)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def check(tensors, **options):
    compare(
        lambda *x: ours.attention(*x, **options),
        lambda *x: attention_reference(*x, **options),
        tensors,
        tensors[0].dtype,
        factor=1.5,
    )


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((150, 150, 2, 1, 64), {}),
        ((70, 200, 1, 1, 128), {"window": 50, "return_lse": True}),
        ((150, 70, 2, 2, 128), {}),  # rows that see nothing
        ((64, 70, 1, 1, 256), {"causal": False}),  # whose backward is Triton's
    ],
)
def test_values_and_gradients(device, sizes, options):
    check(inputs(device, *sizes), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 200}, {"documents": True}])
def test_every_width_and_mask(device, width, options):
    if device.type == "cpu":
        pytest.skip("long; a mask and a width at a time are emulated")
    if "documents" in options:
        options = {"documents": torch.randint(0, 1100, (1100, 2), device=device).sort(0).values // 230}
    for queries, dtype in ((1100, torch.bfloat16), (301, torch.float16)):
        check(inputs(device, queries, 1100, 8, 2, width, dtype), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("length", "options"), [(1023, {}), (2048, {}), (1025, {"window": 200})])
def test_error_is_at_most_twice_torchs(device, width, length, options, record_property):
    if device.type == "cpu":
        pytest.skip("long; the emulated output is compared at short lengths")
    check_the_rule(ours.attention, inputs(device, length, length, 8, 2, width), options, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_outputs_and_gradients_repeat_bitwise(device, width):
    if device.type == "cpu":
        pytest.skip("the emulator adds in one order")
    tensors = [x.requires_grad_() for x in inputs(device, 2048, 2048, 8, 2, width)]
    upstream = torch.randn_like(tensors[0])

    def once():
        out = ours.attention(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]

    first, *others = (once() for _ in range(30))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
